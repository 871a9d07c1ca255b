// The inputs of the causal convolution and its gradients.
#pragma once

#include "../cpu/float64.h"
#include "qparams.h"

#define PTQ4VM_CONV "Tensor x, Tensor weight, Tensor? bias, bool silu"

namespace ptq4vm {

struct ConvInputs {
  Tensor x, weight;
  Optional bias;
  ScalarType type;
  Conv conv = {};  // without y; of float64 only sizes

  ConvInputs(const Tensor& x_, const Tensor& weight_, const Optional& bias_, bool silu)
      : x(x_), weight(weight_), bias(bias_) {
    check_axes("x", x, 3, "(B, L, E)"), check_axes("weight", weight, 2, "(E, K)");
    conv.directions = 1, conv.batch = x.size(0), conv.tokens = x.size(1), conv.channels = x.size(2);
    conv.taps = weight.size(1), conv.silu = silu;
    PTQ4VM_CHECK(conv.taps >= 1, "a convolution needs at least one tap");
    check_shape("weight", weight, {conv.channels, conv.taps});
    check_shape("bias", bias, {conv.channels});
    type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check_float64(type);
    x = type == ScalarType::Double ? floats("x", x, type) : as_rows("x", x);
    weight = floats("weight", weight, type), bias = floats("bias", bias, type);
    if (type == ScalarType::Double) return;
    conv.x = rows(x), conv.weight = const_ptr<float>(weight), conv.bias = const_ptr<float>(bias);
  }
};

}  // namespace ptq4vm
