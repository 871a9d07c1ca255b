// The library that ONNX Runtime loads: the domain "ptq4vm", and in it an operator for each that bindings register.
#include <atomic>
#include <deque>
#include <string_view>

#include "registration.h"

namespace ptq4vm::ort {
namespace {

constexpr const char* DOMAIN = "ptq4vm";
constexpr int ANY_TYPE = 0;
constexpr ScalarType FLOATS[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};

std::atomic<const OrtApi*> registered{nullptr};  // of the runtime, which only `infer` is not told

// An operator; one whose result is like its first input is several for the runtime, one for each type of that.
struct CustomOp : OrtCustomOp {
  const Operator* op;
  ScalarType first;  // if a result is like it
};

const Operator& op_of(const OrtCustomOp* custom) { return *static_cast<const CustomOp*>(custom)->op; }

int first_type_of(const OrtCustomOp* custom) { return static_cast<int>(static_cast<const CustomOp*>(custom)->first); }

// Calls f; returns null, or what it throws as the runtime's status, which begins with the operator's name.
template <class F>
OrtStatus* guarded(const Api& api, std::string_view name, const F& f) noexcept {
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

CustomOp custom_op(const Operator& op, ScalarType first) {
  CustomOp custom{};
  custom.op = &op, custom.first = first, custom.version = OLDEST;
  custom.name = [](const OrtCustomOp* c) { return op_of(c).name.c_str(); };
  custom.provider = [](const OrtCustomOp*) -> const char* { return nullptr; };
  custom.input_type = [](const OrtCustomOp* c, size_t place) {
    return op_of(c).results[0] == LIKE_INPUT && place == 0 ? first_type_of(c) : ANY_TYPE;
  };
  custom.input_count = [](const OrtCustomOp* c) { return op_of(c).inputs.size(); };
  custom.input_optional = [](const OrtCustomOp* c, size_t place) {
    return static_cast<int>(op_of(c).inputs[place]->kind == Argument::OPTIONAL_TENSOR);
  };
  custom.input_memory = [](const OrtCustomOp*, size_t) { return 0; };
  custom.output_type = [](const OrtCustomOp* c, size_t place) {
    const Result result = op_of(c).results[place];
    return result == LIKE_INPUT ? first_type_of(c) : result == OUT_DTYPE ? ANY_TYPE : static_cast<int>(result);
  };
  custom.output_count = [](const OrtCustomOp* c) { return op_of(c).results.size(); };
  // All: a node may leave results out, and not all runtimes take another output whose type `infer` says.
  custom.output_optional = [](const OrtCustomOp*, size_t) { return 1; };
  custom.create = [](const OrtCustomOp* c, const OrtApi* table, const OrtKernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, op_of(c).name, [&] { *kernel = new Node(op_of(c), api, info); });
  };
  custom.destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  custom.compute = [](void* kernel, OrtKernelContext* context) {
    const Node& node = *static_cast<Node*>(kernel);
    return guarded(node.api, node.op.name, [&] { node.op.call(Run(node, context)); });
  };
  custom.first_version = [](const OrtCustomOp*) { return 1; };
  custom.last_version = [](const OrtCustomOp*) { return 1; };
  if (op.results[0] != OUT_DTYPE) return custom;
  custom.infer = [](const OrtCustomOp* c, OrtShapeInferContext* node) {
    const Api api(registered);
    return guarded(api, op_of(c).name, [&] { infer(api, op_of(c), node); });
  };
  return custom;
}

// The operators as the runtime keeps pointers to them.
const std::deque<CustomOp>& custom_ops() {
  static const std::deque<CustomOp> all = [] {
    std::deque<CustomOp> made;
    for (const Operator* op : operators()) {
      const bool is_like_input = op->results[0] == LIKE_INPUT;
      for (const ScalarType first : FLOATS) {
        if (is_like_input || first == ScalarType::Float) made.push_back(custom_op(*op, first));
      }
    }
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
  const Api api(table ? table : base->get_api(1));
  return guarded(api, "RegisterCustomOps", [&] {
    if (!table) {
      throw std::runtime_error(" needs ONNX Runtime 1." + std::to_string(OLDEST) + " or newer, this is " +
                               base->version() + ": pip install --upgrade onnxruntime");
    }
    registered = table;
    OrtCustomOpDomain* domain = api.domain(DOMAIN);
    for (const CustomOp& op : custom_ops()) api.add_operator(domain, &op);
    api.add_domain(options, domain);
  });
}
