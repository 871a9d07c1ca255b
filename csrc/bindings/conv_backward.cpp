// The gradients of the causal convolution, which only the CPU has.
#include "conv_inputs.h"
#include "run.h"

namespace ptq4vm {
namespace {

Tensor sum_images(const Tensor& x) {
  const int64_t axis = 0;
  return torch::stable::sum(x, Shape(&axis, 1));
}

std::tuple<Tensor, Tensor, Tensor> causal_conv1d_backward(Tensor grad, Tensor x, Tensor weight, Optional bias,
                                                          bool silu) {
  ConvInputs c(x, weight, bias, silu);
  check_shape("grad", grad, x.sizes());
  const ScalarType grad_type = grad.scalar_type();
  c.x = floats("x", c.x, c.type), grad = floats("grad", grad, c.type);
  c.conv.x = rows(c.x);
  const int64_t batch = c.conv.batch, channels = c.conv.channels, taps = c.conv.taps;
  const bool empty = !grad.numel(), by_image = !empty && c.type == ScalarType::Float;
  const auto fresh = [&](Shape sizes) {
    return by_image ? empty_like(c.x, sizes, c.type) : zeros_like(c.x, sizes, c.type);
  };
  Tensor dx = fresh(x.sizes());
  Tensor dweight = by_image ? fresh({batch, channels, taps}) : fresh({channels, taps});
  Optional dbias;
  if (bias) dbias = by_image ? fresh({batch, channels}) : fresh({channels});
  if (by_image) {
    run(x, ConvBackward{.forward = c.conv,
                        .grad = const_ptr<float>(grad),
                        .x = mutable_ptr<float>(dx),
                        .weight = mutable_ptr<float>(dweight),
                        .bias = mutable_ptr<float>(dbias)});
    dweight = sum_images(dweight);
    if (dbias) dbias = sum_images(*dbias);
  } else if (!empty) {
    float64::conv_backward(float64::Conv(c), const_ptr<double>(grad), mutable_ptr<double>(dx),
                           mutable_ptr<double>(dweight), mutable_ptr<double>(dbias));
  }
  return {cast_like(dx, x), cast_like(dweight, weight),
          bias ? cast_like(*dbias, *bias) : empty_like(c.x, {0}, grad_type)};
}

}  // namespace
}  // namespace ptq4vm

PTQ4VM_IMPL(causal_conv1d_backward, "(Tensor grad, " PTQ4VM_CONV ") -> (Tensor, Tensor, Tensor)")
