// The registration of a function as an operator, with the checks of all operators' tensors.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <string_view>
#include <tuple>

#include "tensors.h"

namespace ptq4vm {

// The argument at a place of an operator's schema.
inline std::string argument_of(std::string_view schema, int place) {
  std::string_view rest = schema.substr(schema.find('(') + 1, schema.find(')') - schema.find('(') - 1);
  for (; place > 0; place--) rest.remove_prefix(rest.find(", ") + 2);
  rest = rest.substr(0, rest.find(", "));
  return std::string(rest.substr(rest.rfind(' ') + 1));
}

// Returns whether gradients of a result would be asked for, for which the stable ABI has no call. An alias of a leaf
// that requires gradients is no leaf.
inline bool requires_gradient(const Tensor& x) {
  if (!is_float(x.scalar_type())) return false;
  std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::alias", "", stack.data(), TORCH_ABI_VERSION));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return !torch::stable::detail::to<bool>(stack[0]);
}

// Checked<&f, Schema>::call is f for an operator, after the checks of its tensors: one device,
// memory that lies in strides, and no gradients. An operator that has gradients comes here without them. An error
// begins with the operator's name, which one that begins with a space continues.
template <auto F, class Schema>
struct Checked;

template <class Result, class... Arguments, Result (*F)(Arguments...), class Schema>
struct Checked<F, Schema> {
  static Result call(Arguments... arguments) {
    try {
      State state{aoti_torch_grad_mode_is_enabled()};
      (check(state, arguments), ...);
      return F(arguments...);
    } catch (const std::exception& error) {
      std::string message = error.what();
      message = message.substr(0, message.find(" (originally from"));  // what follows is a file of torch's
      const std::string_view schema = Schema::text();
      throw std::runtime_error("ptq4vm::" + std::string(schema.substr(0, schema.find('('))) +
                               (message[0] == ' ' ? "" : ": ") + message);
    }
  }

 private:
  struct State {
    bool gradients;
    int place = -1;
    std::optional<torch::stable::Device> first = std::nullopt;
  };

  static void check(State& state, const Tensor& x) {
    state.place++;
    PTQ4VM_CHECK(x.defined(), argument(state), " is None, it must be a tensor");
    const auto device = x.device();
    if (!state.first) state.first = device;
    PTQ4VM_CHECK(device == *state.first, "all tensors must be on one device: the first is on ", name(*state.first),
                 ", another on ", name(device), ", ", argument(state),
                 "; move the model and its inputs with .to(device)");
    PTQ4VM_CHECK(x.layout() == torch::headeronly::Layout::Strided, argument(state), " is sparse: call .to_dense()");
    PTQ4VM_CHECK(!state.gradients || !requires_gradient(x), "the operator has no gradient, and ", argument(state),
                 " requires one: call it under torch.no_grad(), or take gradients of the prepared model");
  }

  static void check(State& state, const Optional& x) { x ? check(state, *x) : void(state.place++); }

  template <class T>
  static void check(State& state, const T&) {
    state.place++;
  }

  static std::string argument(const State& state) { return argument_of(Schema::text(), state.place); }

  static std::string name(const torch::stable::Device& device) {
    if (device.is_cpu()) return "the CPU";
    if (device.is_cuda()) return "GPU " + std::to_string(device.index());
    return "another device";
  }
};

}  // namespace ptq4vm

// Registers ptq4vm::name for this library's device. The schema, "(arguments) -> results", is the one that ptq4vm/ops
// defines where the libraries are missing; a test holds them equal. The CPU's library defines it. What follows, the
// types of the results, is for ONNX Runtime: see onnxruntime/registration.h.
#ifdef PTQ4VM_CUDA
#define PTQ4VM_DEFINE(schema)
#else
#define PTQ4VM_DEFINE(schema) \
  STABLE_TORCH_LIBRARY_FRAGMENT(ptq4vm, m) { m.def(schema); }
#endif
#define PTQ4VM_IMPL(name, schema, ...)                                                    \
  struct Schema_##name {                                                                  \
    static const char* text() { return #name schema; }                                    \
  };                                                                                      \
  PTQ4VM_DEFINE(#name schema)                                                             \
  STABLE_TORCH_LIBRARY_IMPL(PTQ4VM_LIBRARY, PTQ4VM_KEY, m) {                              \
    m.impl(#name, TORCH_BOX((&::ptq4vm::Checked<&::ptq4vm::name, Schema_##name>::call))); \
  }
