// Operators, nodes and their runs: arguments from the runtime, and results in its memory.
#include "../bindings/tensors.h"

#include "registration.h"

namespace ptq4vm {
namespace ort {
namespace {

thread_local const Run* current_run = nullptr;

Tensor view(const Api& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = api.info(value);
  const size_t axes = api.axes(info);
  std::array<int64_t, Tensor::MAX_AXES> sizes;
  api.sizes(info, sizes.data(), std::min(axes, sizes.size()));
  const auto type = static_cast<ScalarType>(api.type(info));
  api.release(info);
  return Tensor(api.data(value), {sizes.data(), axes}, type);
}

}  // namespace

std::vector<const Operator*>& operators() {
  static std::vector<const Operator*> all;
  return all;
}

Operator::Operator(const char* schema, std::vector<Result> results_, void (*call_)(const Run&))
    : results(std::move(results_)), call(call_) {
  std::string_view text = schema;
  const size_t open = text.find('('), close = text.find(')');
  name = text.substr(0, open);
  for (text = text.substr(open + 1, close - open - 1); !text.empty();) {
    const std::string_view one = text.substr(0, text.find(", "));
    text.remove_prefix(std::min(text.size(), one.size() + 2));
    const std::string_view type = one.substr(0, one.find(' '));
    Argument argument{Argument::INTEGER, std::string(one.substr(type.size() + 1)), -1};
    if (type == "Tensor") argument.kind = Argument::TENSOR;
    if (type == "Tensor?") argument.kind = Argument::OPTIONAL_TENSOR;
    if (type == "float") argument.kind = Argument::FLOAT;
    arguments.push_back(std::move(argument));
  }
  for (Argument& argument : arguments) {
    if (argument.kind > Argument::OPTIONAL_TENSOR) continue;
    argument.input = static_cast<int>(inputs.size());
    inputs.push_back(&argument);
  }
}

int Operator::place_of(std::string_view argument) const {
  const auto named = [&](const Argument& a) { return a.name == argument; };
  return static_cast<int>(std::find_if(arguments.begin(), arguments.end(), named) - arguments.begin());
}

Node::Node(const Operator& op_, const Api& api_, const OrtKernelInfo* info)
    : op(op_), api(api_), inputs(api.input_count(info)), integers(op.arguments.size()), floats(op.arguments.size()),
      constants(op.arguments.size()) {
  for (size_t i = 0; i < op.arguments.size(); i++) {
    const Argument& argument = op.arguments[i];
    if (argument.kind == Argument::INTEGER) integers[i] = api.int_attribute(info, argument.name.c_str());
    if (argument.kind == Argument::FLOAT) floats[i] = api.float_attribute(info, argument.name.c_str());
    if (argument.input < 0 || static_cast<size_t>(argument.input) >= inputs) continue;
    if (const OrtValue* value = api.constant(info, argument.input)) constants[i] = view(api, value);
  }
}

Run::Run(const Node& node, OrtKernelContext* context) : node_(node), context_(context) { current_run = this; }

Run::~Run() { current_run = outer_; }

const Run* Run::current() { return current_run; }

std::optional<Tensor> Run::optional_tensor(int place) const {
  if (node_.constants[place]) return node_.constants[place];
  const size_t index = node_.op.arguments[place].input;
  const OrtValue* value = index < node_.inputs ? node_.api.input(context_, index) : nullptr;
  return value ? std::optional(view(node_.api, value)) : std::nullopt;
}

Tensor Run::tensor(int place) const {
  const std::optional<Tensor> given = optional_tensor(place);
  PTQ4VM_CHECK(given, node_.op.arguments[place].name, " is None, it must be a tensor");
  return *given;
}

std::optional<Tensor> Run::output(int place, Shape sizes) const {
  OrtValue* value = node_.api.output(context_, place, sizes.data(), sizes.size());
  return value ? std::optional(view(node_.api, value)) : std::nullopt;
}

Tensor Run::empty(int place, Shape sizes, ScalarType type) const {
  const std::optional<Tensor> result = output(place, sizes);
  return result && result->scalar_type() == type ? *result : Tensor(sizes, type);
}

void Run::finish(int place, const Tensor& result) const {
  const std::optional<Tensor> wanted = output(place, result.sizes());
  if (!wanted || wanted->const_data_ptr() == result.const_data_ptr()) return;
  PTQ4VM_CHECK(wanted->scalar_type() == result.scalar_type(), "the model says that result ", place, " is ",
               name(wanted->scalar_type()), ", but it is ", name(result.scalar_type()),
               ": name types and shapes in its value_info");
  std::copy_n(const_ptr<char>(result), result.numel() * result.element_size(),
              static_cast<char*>(wanted->mutable_data_ptr()));
}

}  // namespace ort

Tensor empty_result(int place, const Tensor&, Shape sizes, ScalarType type) {
  return ort::Run::current()->empty(place, sizes, type);
}

}  // namespace ptq4vm
