// Rotations and norms before a quantized linear: ops.rotate, ops.rotate_quantize and norm_quantize.
#include "run.h"

namespace ptq4vm {
namespace {

Tensor rotate(Tensor x) {
  check_channels("x", x);
  const RotationMatrix rotation(channels_of(x));
  const ContiguousInput input(x);
  Tensor y = empty_result(0, input.values, input.values.scalar_type());
  run(x, Rotate{.x = input.data(),
                .y = y.mutable_data_ptr(),
                .type = input.type,
                .rotation = rotation.view(),
                .rows = rows_of(x)});
  return cast_like(y, x);
}

Tensor rotate_quantize(Tensor x, bool gelu, Tensor inv_scale, Tensor zero_point, Optional inv_smooth, int64_t bits) {
  check_channels("x", x);
  check_shape("inv_smooth", inv_smooth, {channels_of(x)});
  const OutputQParams qparams(inv_scale, zero_point, inv_smooth, bits, scales_of(x, inv_scale));
  const RotationMatrix rotation(channels_of(x));
  const ContiguousInput input(x);
  Tensor codes = empty_result(0, x, ScalarType::Char);
  run(x, RotateQuantize{.x = input.data(),
                        .x_type = input.type,
                        .gelu = gelu,
                        .rotation = rotation.view(),
                        .codes = mutable_ptr<int8_t>(codes),
                        .qparams = qparams.view(),
                        .rows = rows_of(x)});
  return codes;
}

std::tuple<Tensor, Tensor> norm_quantize(Tensor x, Optional residual, Optional weight, Optional bias, double eps,
                                         bool rms, bool rotated, Tensor inv_scale, Tensor zero_point,
                                         Optional inv_smooth, int64_t bits) {
  check_channels("x", x);
  const int64_t channels = channels_of(x);
  check_shape("residual", residual, x.sizes());
  check_shape("weight", weight, {channels});
  check_shape("bias", bias, {channels});
  check_shape("inv_smooth", inv_smooth, {channels});
  PTQ4VM_CHECK(!rms || !bias, "an RMS norm has no bias");
  const OutputQParams qparams(inv_scale, zero_point, inv_smooth, bits, scales_of(x, inv_scale));
  residual = floats("residual", residual), weight = floats("weight", weight), bias = floats("bias", bias);
  const RotationMatrix matrix(channels);
  const Rotation rotation = matrix.view();
  const ContiguousInput input(x);
  Tensor total = residual ? empty_result(0, x, ScalarType::Float) : empty_result(0, x, {0}, ScalarType::Float);
  Tensor codes = empty_result(1, x, ScalarType::Char);
  run(x, NormQuantize{.x = input.data(),
                      .x_type = input.type,
                      .residual = const_ptr<float>(residual),
                      .weight = const_ptr<float>(weight),
                      .bias = const_ptr<float>(bias),
                      .total = residual ? mutable_ptr<float>(total) : nullptr,
                      .codes = mutable_ptr<int8_t>(codes),
                      .qparams = qparams.view(),
                      .rows = rows_of(x),
                      .channels = channels,
                      .eps = static_cast<float>(eps),
                      .rms = rms,
                      .rotation = rotated ? &rotation : nullptr});
  return {total, codes};
}

}  // namespace
}  // namespace ptq4vm

PTQ4VM_IMPL(rotate, "(Tensor x) -> Tensor", LIKE_INPUT)
PTQ4VM_IMPL(rotate_quantize, "(Tensor x, bool gelu, " PTQ4VM_QPARAMS ") -> Tensor", INT8)
PTQ4VM_IMPL(
    norm_quantize,
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, bool rotated, " PTQ4VM_QPARAMS
    ") -> (Tensor, Tensor)",
    FLOAT32, INT8)
