// The type of a linear's result before a model runs, which its out_dtype says. The runtime takes no type without a
// shape: that of x, with other channels.
#include <atomic>

#include "registration.h"

namespace ptq4vm::ort {
namespace {

// A size, which may have a name instead of a value.
struct Size {
  int64_t value;
  std::string name;
};

std::vector<Size> sizes_of(const Api& api, const Operator& op, const OrtShapeInferContext* node,
                           std::string_view argument) {
  const OrtTensorTypeAndShapeInfo* info = api.input(node, op.arguments[op.place_of(argument)].input);
  const size_t axes = api.axes(info);
  std::vector<int64_t> values(axes);
  std::vector<const char*> names(axes);
  if (axes) api.sizes(info, values.data(), axes), api.names(info, names.data(), axes);
  std::vector<Size> sizes;
  for (size_t axis = 0; axis < axes; axis++) sizes.push_back({values[axis], names[axis]});
  return sizes;
}

}  // namespace

void infer(const Api& api, const Operator& op, OrtShapeInferContext* node) {
  static std::atomic<int64_t> unknown{0};
  std::vector<Size> sizes = sizes_of(api, op, node, "x");
  const std::vector<Size> features = sizes_of(api, op, node, "weight_scale");
  if (sizes.empty() || features.empty()) return;  // the runtime then takes the type of scales, float32
  sizes.back() = features.back();
  std::vector<int64_t> values;
  std::vector<const char*> names;
  for (Size& size : sizes) {
    // Sizes of one name are taken to be equal, so that an unknown one needs a name of its own.
    if (size.value < 0 && size.name.empty()) size.name = "ptq4vm_" + std::to_string(unknown++);
    values.push_back(size.value), names.push_back(size.name.c_str());
  }
  const auto release = [&](OrtTensorTypeAndShapeInfo* info) { api.release(info); };
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> result(api.new_info(), release);
  api.set_type(result.get(), static_cast<int>(api.int_value(api.attribute(node, "out_dtype"))));
  api.set_sizes(result.get(), values.data(), values.size());
  api.set_names(result.get(), names.data(), names.size());
  api.set_output(node, 0, result.get());
}

}  // namespace ptq4vm::ort
