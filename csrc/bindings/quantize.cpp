// Quantization: ops.quantize, gate_quantize, choose_qparams and dequantize.
#include "run.h"

namespace ptq4vm {
namespace {

Tensor quantize(Tensor x, Tensor inv_scale, Tensor zero_point, Optional inv_smooth, int64_t bits) {
  check_channels("x", x);
  check_shape("inv_smooth", inv_smooth, {channels_of(x)});
  const OutputQParams qparams(inv_scale, zero_point, inv_smooth, bits, scales_of(x, inv_scale));
  const ContiguousInput input(x);
  Tensor codes = empty_result(0, x, ScalarType::Char);
  run(x, Quantize{.x = input.data(),
                  .x_type = input.type,
                  .qparams = qparams.view(),
                  .codes = mutable_ptr<int8_t>(codes),
                  .rows = rows_of(x),
                  .channels = channels_of(x)});
  return codes;
}

Tensor gate_quantize(Tensor x, Tensor gate, bool silu, Tensor inv_scale, Tensor zero_point, Optional inv_smooth,
                     int64_t bits) {
  check_axes("x", x, 4, "(K, B, L, E)"), check_axes("gate", gate, 4, "(K, B, L, E) or (K, B, 1, E)");
  const int64_t terms = x.size(0), batch = x.size(1), tokens = x.size(2), channels = x.size(3);
  const bool shared = gate.size(2) == 1;
  const int64_t scales = inv_scale.numel();
  PTQ4VM_CHECK(terms >= 1, "x (K, B, L, E) has no term");
  check_shape("gate", gate, {terms, batch, shared ? 1 : tokens, channels});
  check_token_scales(scales, tokens);
  check_shape("inv_scale", inv_scale, {scales});
  check_shape("inv_smooth", inv_smooth, {channels});
  const OutputQParams qparams(inv_scale, zero_point, inv_smooth, bits, scales);
  x = as_rows("x", x), gate = as_rows("gate", gate);
  Tensor codes = empty_result(0, x, {batch, tokens, channels}, ScalarType::Char);
  GateQuantize q{.x = rows(x),
                 .gate = rows(gate),
                 .x_term = x.stride(0),
                 .gate_term = gate.stride(0),
                 .silu = silu,
                 .qparams = qparams.view(),
                 .codes = mutable_ptr<int8_t>(codes),
                 .terms = terms,
                 .batch = batch,
                 .tokens = tokens,
                 .channels = channels};
  if (shared) q.gate.row = 0;
  run(x, q);
  return codes;
}

std::tuple<Tensor, Tensor> choose_qparams(Tensor x, Optional inv_smooth, int64_t bits) {
  check_bits(bits), check_channels("x", x);
  PTQ4VM_CHECK(channels_of(x) > 0, "x needs channels: no token has a range without them");
  check_shape("inv_smooth", inv_smooth, {channels_of(x)});
  inv_smooth = floats("inv_smooth", inv_smooth);
  const ContiguousInput input(x);
  const Shape tokens(x.sizes().data(), x.sizes().size() - 1);
  Tensor scale = empty_result(0, x, tokens, ScalarType::Float);
  Tensor zero_point = empty_result(1, x, tokens, ScalarType::Int);
  run(x, ChooseQParams{.x = input.data(),
                       .x_type = input.type,
                       .inv_smooth = const_ptr<float>(inv_smooth),
                       .scale = mutable_ptr<float>(scale),
                       .zero_point = mutable_ptr<int32_t>(zero_point),
                       .rows = rows_of(x),
                       .channels = channels_of(x),
                       .low = lowest(bits),
                       .high = highest(bits)});
  return {scale, zero_point};
}

Tensor dequantize(Tensor x_q, Tensor scale, Tensor zero_point) {
  check_codes("x_q", x_q, 1);
  check_zero_points("zero_point", zero_point, scale);
  const int64_t scales = scales_of(x_q, scale);
  x_q = to_contiguous(x_q);
  scale = floats("scale", scale), zero_point = zero_points("zero_point", zero_point);
  Tensor y = empty_result(0, x_q, ScalarType::Float);
  run(x_q, Dequantize{.x = const_ptr<int8_t>(x_q),
                      .scale = const_ptr<float>(scale),
                      .zero_point = const_ptr<int32_t>(zero_point),
                      .y = mutable_ptr<float>(y),
                      .rows = rows_of(x_q),
                      .channels = channels_of(x_q),
                      .scales = scales});
  return y;
}

}  // namespace
}  // namespace ptq4vm

PTQ4VM_IMPL(quantize, "(Tensor x, Tensor inv_scale, Tensor zero_point, Tensor? inv_smooth, int bits) -> Tensor", INT8)
PTQ4VM_IMPL(gate_quantize, "(Tensor x, Tensor gate, bool silu, " PTQ4VM_QPARAMS ") -> Tensor", INT8)
PTQ4VM_IMPL(choose_qparams, "(Tensor x, Tensor? inv_smooth, int bits) -> (Tensor scale, Tensor zero_point)", FLOAT32,
            INT32)
PTQ4VM_IMPL(dequantize, "(Tensor x_q, Tensor scale, Tensor zero_point) -> Tensor", FLOAT32)
