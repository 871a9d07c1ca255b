// Types and shapes of results before a model runs, for operators whose first result is not of one type. The runtime
// takes no type without a shape.
#include <atomic>

#include "registration.h"

namespace ptq4vm::ort {
namespace {

// A size, which may have a name instead of a value.
struct Size {
  int64_t value;
  std::string name;
};

// An operator's node, by the names of its arguments.
struct Described {
  const Operator& op;
  OrtShapeInferContext* node;

  std::vector<Size> sizes(std::string_view argument) const {
    const OrtTensorTypeAndShapeInfo* info = api.input(node, op.arguments[op.place_of(argument)].input);
    const size_t axes = api.axes(info);
    std::vector<int64_t> values(axes);
    std::vector<const char*> names(axes);
    if (axes) api.sizes(info, values.data(), axes), api.names(info, names.data(), axes);
    std::vector<Size> sizes;
    for (size_t axis = 0; axis < axes; axis++) sizes.push_back({values[axis], names[axis]});
    return sizes;
  }

  int64_t attribute(const char* name) const { return api.int_value(api.attribute(node, name)); }

  int type() const {
    if (op.results[0] == OUT_DTYPE) return static_cast<int>(attribute("out_dtype"));
    return api.type(api.input(node, 0));
  }
};

// The first of some sizes, and the last; unknown where there are none.
Size first(const std::vector<Size>& sizes) { return sizes.empty() ? Size{-1, ""} : sizes.front(); }
Size last(const std::vector<Size>& sizes) { return sizes.empty() ? Size{-1, ""} : sizes.back(); }

// That of the first argument, but for some operators. No axes: unknown.
std::vector<Size> result_sizes(const Described& d) {
  std::vector<Size> sizes = d.sizes(d.op.arguments[0].name);
  if (sizes.empty()) return sizes;
  if (d.op.results[0] == OUT_DTYPE) sizes.back() = last(d.sizes("weight_scale"));
  if (d.op.name == "conv1d_quantize") sizes.insert(sizes.begin(), first(d.sizes("weight")));
  if (d.op.name == "directional_scan") {
    sizes.front() = first(d.sizes("order"));
    if (d.attribute("merge")) sizes.erase(sizes.begin());
  }
  return sizes;
}

}  // namespace

void infer(const Operator& op, OrtShapeInferContext* node) {
  static std::atomic<int64_t> unknown{0};
  const Described described{op, node};
  std::vector<Size> sizes = result_sizes(described);
  if (sizes.empty()) return;
  std::vector<int64_t> values;
  std::vector<const char*> names;
  for (Size& size : sizes) {
    // Sizes of one name are taken to be equal, so that an unknown one needs a name of its own.
    if (size.value < 0 && size.name.empty()) size.name = "ptq4vm_" + std::to_string(unknown++);
    values.push_back(size.value), names.push_back(size.name.c_str());
  }
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> result(
      api.new_info(), [](OrtTensorTypeAndShapeInfo* info) { api.release(info); });
  api.set_type(result.get(), described.type());
  api.set_sizes(result.get(), values.data(), values.size());
  api.set_names(result.get(), names.data(), names.size());
  api.set_output(node, 0, result.get());
}

}  // namespace ptq4vm::ort
