// The inputs of the causal convolution and its gradients.
#pragma once

#include "../cpu/float64.h"
#include "qparams.h"

#define PTQ4VM_CONV "Tensor x, Tensor weight, Tensor? bias, bool silu"

namespace ptq4vm {

struct ConvInputs {
  Tensor x, weight;
  Optional bias;
  int64_t batch, tokens, channels, taps;
  ScalarType type;
  bool silu;

  ConvInputs(const Tensor& x_, const Tensor& weight_, const Optional& bias_, bool silu_)
      : x(x_), weight(weight_), bias(bias_), silu(silu_) {
    check_axes("x", x, 3, "(B, L, E)"), check_axes("weight", weight, 2, "(E, K)");
    batch = x.size(0), tokens = x.size(1), channels = x.size(2), taps = weight.size(1);
    PTQ4VM_CHECK(taps >= 1, "a convolution needs at least one tap");
    check_shape("weight", weight, {channels, taps});
    check_shape("bias", bias, {channels});
    type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check_float64(type);
    x = type == ScalarType::Double ? floats("x", x, type) : as_rows("x", x);
    weight = floats("weight", weight, type), bias = floats("bias", bias, type);
  }

  Conv view(void* y) const {
    return {.x = rows(x),
            .weight = const_ptr<float>(weight),
            .bias = const_ptr<float>(bias),
            .order = nullptr,
            .y = y,
            .codes = nullptr,
            .qparams = {},
            .directions = 1,
            .batch = batch,
            .tokens = tokens,
            .channels = channels,
            .taps = taps,
            .silu = silu};
  }

  float64::Conv exact() const {
    return {.x = const_ptr<double>(x),
            .weight = const_ptr<double>(weight),
            .bias = const_ptr<double>(bias),
            .batch = batch,
            .tokens = tokens,
            .channels = channels,
            .taps = taps,
            .silu = silu};
  }
};

}  // namespace ptq4vm
