// Runs an ONNX file in ONNX Runtime: run_onnx MODEL.onnx IMAGES.f32 [LIBRARY], with the library for --runtime custom
#include <onnxruntime_cxx_api.h>

#include "images.h"

int main(int count, char** arguments) try {
  if (count < 3 || count > 4) throw std::runtime_error("usage: run_onnx MODEL.onnx IMAGES.f32 [LIBRARY]");
  Ort::Env environment;
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
#ifdef __x86_64__
  if (!__builtin_cpu_supports("avx512vnni") && !__builtin_cpu_supports("avxvnni")) {
    options.AddConfigEntry("session.x64quantprecision", "1");  // its fastest sums of int8 products overflow there
  }
#endif
  if (count == 4) options.RegisterCustomOpsLibrary(arguments[3]);
  Ort::Session session(environment, arguments[1], options);

  Ort::AllocatorWithDefaultOptions allocator;
  const auto input_name = session.GetInputNameAllocated(0, allocator),
             output_name = session.GetOutputNameAllocated(0, allocator);
  const char *input_names[]{input_name.get()}, *output_names[]{output_name.get()};
  std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();  // -1, C, H, W
  const size_t image = std::accumulate(shape.begin() + 1, shape.end(), size_t{1}, std::multiplies<>());
  std::vector<float> images = read_images(arguments[2], image);
  shape[0] = images.size() / image;
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto input = Ort::Value::CreateTensor<float>(memory, images.data(), images.size(), shape.data(), shape.size());
  report(shape[0], [&] {
    const auto outputs = session.Run(Ort::RunOptions{}, input_names, &input, 1, output_names, 1);
    const float* logits = outputs[0].GetTensorData<float>();
    return std::vector<float>(logits, logits + outputs[0].GetTensorTypeAndShapeInfo().GetElementCount());
  });
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
