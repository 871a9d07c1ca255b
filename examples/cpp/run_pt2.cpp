// Runs a compiled package (.pt2) without Python: run_pt2 LIBRARY MODEL.pt2 IMAGES.f32 C H W
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "images.h"

int main(int count, char** arguments) try {
  if (count != 7) throw std::runtime_error("usage: run_pt2 LIBRARY MODEL.pt2 IMAGES.f32 C H W");
  // the kernels of ptq4vm, which register themselves as operators of torch
  if (!dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);

  std::vector<int64_t> shape{-1, std::stol(arguments[4]), std::stol(arguments[5]), std::stol(arguments[6])};
  std::vector<float> images = read_images(arguments[3], shape[1] * shape[2] * shape[3]);
  const at::Tensor input = at::from_blob(images.data(), {static_cast<int64_t>(images.size())}).view(shape);
  report(input.size(0), [&] {
    const at::Tensor logits = model.run({input})[0].to(at::kFloat).contiguous();
    return std::vector<float>(logits.const_data_ptr<float>(), logits.const_data_ptr<float>() + logits.numel());
  });
} catch (const c10::Error& error) {
  std::fprintf(stderr, "%s\n", error.what_without_backtrace());
  return 1;
} catch (const std::invalid_argument&) {
  std::fprintf(stderr, "C, H and W are the size of an image, in whole numbers\n");
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
