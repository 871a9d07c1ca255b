// The library that ONNX Runtime loads: the domain "ptq4vm", and in it an operator for each that bindings register.
#include <algorithm>
#include <deque>
#include <string_view>

#include "registration.h"

namespace ptq4vm::ort {
namespace {

constexpr const char* DOMAIN = "ptq4vm";

struct CustomOp : OrtCustomOp {
  const Operator* op;
};

const Operator& op_of(const OrtCustomOp* custom) { return *static_cast<const CustomOp*>(custom)->op; }

// Calls f; returns null, or what it throws as the runtime's status, which begins with the operator's name.
template <class F>
OrtStatus* guarded(std::string_view name, const F& f) noexcept {
  try {
    try {
      f();
      return nullptr;
    } catch (const std::exception& error) {
      const std::string_view message = error.what();
      const char* between = message.starts_with(' ') ? "" : ": ";
      return api.status((std::string(DOMAIN).append("::").append(name) + between).append(message).c_str());
    }
  } catch (...) {
    return api.status("ptq4vm ran out of memory");
  }
}

CustomOp custom_op(const Operator& op) {
  CustomOp custom{};
  custom.op = &op, custom.version = OLDEST;
  custom.name = [](const OrtCustomOp* c) { return op_of(c).name.c_str(); };
  custom.provider = [](const OrtCustomOp*) -> const char* { return nullptr; };
  custom.input_type = [](const OrtCustomOp*, size_t) { return 0; };  // any: the binding says what is wrong
  custom.input_count = [](const OrtCustomOp* c) { return op_of(c).inputs.size(); };
  custom.input_optional = [](const OrtCustomOp* c, size_t place) {
    return static_cast<int>(op_of(c).inputs[place]->kind == Argument::OPTIONAL_TENSOR);
  };
  custom.input_memory = [](const OrtCustomOp*, size_t) { return 0; };
  custom.output_type = [](const OrtCustomOp* c, size_t place) { return std::max<int>(0, op_of(c).results[place]); };
  custom.output_count = [](const OrtCustomOp* c) { return op_of(c).results.size(); };
  custom.output_optional = [](const OrtCustomOp* c, size_t) { return static_cast<int>(op_of(c).results.size() > 1); };
  custom.create = [](const OrtCustomOp* c, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    return guarded(op_of(c).name, [&] { *kernel = new Node(op_of(c), info); });
  };
  custom.destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  custom.compute = [](void* kernel, OrtKernelContext* context) {
    const Node& node = *static_cast<Node*>(kernel);
    return guarded(node.op.name, [&] { node.op.call(Run(node, context)); });
  };
  custom.first_version = [](const OrtCustomOp*) { return 1; };
  custom.last_version = [](const OrtCustomOp*) { return 1; };
  if (op.results[0] > 0) return custom;
  custom.infer = [](const OrtCustomOp* c, OrtShapeInferContext* node) {
    return guarded(op_of(c).name, [&] { infer(op_of(c), node); });
  };
  return custom;
}

// The operators as the runtime keeps pointers to them.
const std::deque<CustomOp>& custom_ops() {
  static const std::deque<CustomOp> all = [] {
    std::deque<CustomOp> made;
    for (const Operator* op : operators()) made.push_back(custom_op(*op));
    return made;
  }();
  return all;
}

}  // namespace
}  // namespace ptq4vm::ort

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace ptq4vm::ort;
  const OrtApi* table = base->get_api(OLDEST);
  api = Api(table ? table : base->get_api(1));
  return guarded("RegisterCustomOps", [&] {
    if (!table) {
      throw std::runtime_error(" needs ONNX Runtime 1." + std::to_string(OLDEST) + " or newer, this is " +
                               base->version() + ": pip install --upgrade onnxruntime");
    }
    OrtCustomOpDomain* domain = api.domain(DOMAIN);
    for (const CustomOp& op : custom_ops()) api.add_operator(domain, &op);
    api.add_domain(options, domain);
  });
}
