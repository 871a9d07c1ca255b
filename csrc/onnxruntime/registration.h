// The registration of a function of bindings as a custom operator of ONNX Runtime, and its call for a node.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "api.h"
#include "tensor.h"

namespace ptq4vm {

// The type of a result: that of the first argument, that which the attribute out_dtype names, or ONNX's number.
enum Result : int { LIKE_INPUT = 0, OUT_DTYPE = -1, FLOAT32 = 1, INT8 = 3, INT32 = 6 };

namespace ort {

class Run;

// An argument of a schema: an input of nodes, or an attribute.
struct Argument {
  enum Kind { TENSOR, OPTIONAL_TENSOR, INTEGER, FLOAT } kind;
  std::string name;
  int input;  // the place among inputs, or -1
};

struct Operator {
  std::string name;
  std::vector<Argument> arguments;
  std::vector<const Argument*> inputs;
  std::vector<Result> results;
  void (*call)(const Run&);

  Operator(const char* schema, std::vector<Result> results, void (*call)(const Run&));
  Operator(const Operator&) = delete;

  int place_of(std::string_view argument) const;
};

// Those that PTQ4VM_IMPL has registered, at addresses that stay.
std::vector<const Operator*>& operators();

// Tells the runtime type and shape of a result whose type is OUT_DTYPE.
void infer(const Api&, const Operator&, OrtShapeInferContext* node);

// A node of a model: its attributes, and the inputs that are constant.
struct Node {
  const Operator& op;
  Api api;
  size_t inputs;
  std::vector<int64_t> integers;  // by the place of the argument, as the next ones
  std::vector<double> floats;
  std::vector<std::optional<Tensor>> constants;

  Node(const Operator&, const Api&, const OrtKernelInfo*);
};

// A run of a node: its arguments by their places in the schema, and its results.
class Run {
 public:
  Run(const Node&, OrtKernelContext*);
  ~Run();
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  template <class T>
  T argument(int place) const {
    if constexpr (std::is_same_v<T, Tensor>)
      return tensor(place);
    else if constexpr (std::is_same_v<T, std::optional<Tensor>>)
      return optional_tensor(place);
    else if constexpr (std::is_same_v<T, double>)
      return node_.floats[place];
    else
      return static_cast<T>(node_.integers[place]);
  }

  Tensor empty(int place, Shape sizes, ScalarType type) const;  // see empty_result
  void finish(int place, const Tensor& result) const;

  // Calls part(data, index) for every index below `parts`, by threads of the runtime.
  void parallel_for(int64_t parts, void (*part)(void* data, size_t index), void* data) const {
    node_.api.parallel_for(context_, part, parts, data);
  }

  static const Run* current();  // of this thread

 private:
  Tensor tensor(int place) const;
  std::optional<Tensor> optional_tensor(int place) const;
  std::optional<Tensor> output(int place, Shape sizes) const;

  const Node& node_;
  OrtKernelContext* context_;
  const Run* outer_ = current();
};

template <auto F>
struct Function;

template <class Returned, class... Arguments, Returned (*F)(Arguments...)>
struct Function<F> {
  static void call(const Run& run) { call(run, std::index_sequence_for<Arguments...>{}); }

 private:
  template <size_t... places>
  static void call(const Run& run, std::index_sequence<places...>) {
    finish(run, F(run.argument<Arguments>(places)...));
  }

  static void finish(const Run& run, const Tensor& result) { run.finish(0, result); }

  template <class... Tensors>
  static void finish(const Run& run, const std::tuple<Tensors...>& results) {
    int place = 0;
    std::apply([&](const Tensors&... each) { (run.finish(place++, each), ...); }, results);
  }
};

}  // namespace ort
}  // namespace ptq4vm

// Registers ptq4vm::name; what follows the schema are the types of its results.
#define PTQ4VM_IMPL(name, schema, ...)                                                                  \
  namespace ptq4vm::ort {                                                                               \
  static const Operator operator_##name(#name schema, {__VA_ARGS__}, &Function<&::ptq4vm::name>::call); \
  static const bool registered_##name = (operators().push_back(&operator_##name), true);                \
  }
