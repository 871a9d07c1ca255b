// The scans: what kernels can read is read where it lies, also as parts of larger rows.
#include "run.h"
#include "scan_inputs.h"

namespace ptq4vm {
namespace {

Tensor selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z, Optional bias,
                      bool softplus) {
  const ScanInputs s(u, delta, A, B, C, D, z, bias, softplus);
  if (s.type == ScalarType::Double) return selective_scan_in_float64(u, delta, A, B, C, D, z, bias, softplus);
  Tensor y = make(s.u, {s.batch, s.tokens, s.channels}, s.u.scalar_type());
  run(s.view(y.mutable_data_ptr(), float_type(y)), u);
  return typed(y, u);
}

struct DirectionalInputs {
  Tensor u, projected, inv_scale, scale, zero_point, weight, weight_sum, weight_scale, bias, A, order;
  Optional inv_smooth, D, z;
  DirectionalScan scan{};

  DirectionalInputs(const Tensor& u_, const Tensor& projected_, const Tensor& inv_scale_, const Tensor& scale_,
                    const Tensor& zero_point_, const Optional& inv_smooth_, int64_t bits, const Tensor& weight_,
                    const Tensor& weight_sum_, const Tensor& weight_scale_, const Tensor& bias_, const Tensor& A_,
                    const Optional& D_, const Optional& z_, const Tensor& order_, bool merge, double factor) {
    check_axes("u", u_, 4, "(K, B, L, E)"), check_axes("projected", projected_, 4, "(K, B, L, R + 2 S)");
    check_axes("A", A_, 3, "(K, E, S)"), check_axes("order", order_, 2, "(K, T)");
    const int64_t K = order_.size(0), batch = u_.size(1), tokens = u_.size(2), channels = u_.size(3);
    const int64_t states = A_.size(2), rank = projected_.size(3) - 2 * states;
    const int64_t scales = inv_scale_.dim() == 2 ? inv_scale_.size(1) : 0;
    check_bits(bits);
    PTQ4VM_CHECK(K >= 1, "the order (K, T) has no direction");
    PTQ4VM_CHECK(u_.size(0) == K || u_.size(0) == 1, "u has ", u_.size(0), " directions, the order ", K);
    PTQ4VM_CHECK(1 <= rank && rank <= 512, "projected has ", projected_.size(3), " channels: with ", states,
                 " states that leaves ", rank, " for the step, which must be between 1 and 512");
    PTQ4VM_CHECK(scales == tokens || scales == 1, "the step's scales were calibrated for ", scales,
                 " tokens, the input has ", tokens, "; calibrate at this resolution or use Granularity.PER_TENSOR");
    const bool packed = weight_.scalar_type() == ScalarType::Byte;
    PTQ4VM_CHECK(packed || weight_.scalar_type() == ScalarType::Char,
                 "step_weight must be int8, or uint8 with two 4-bit codes a byte, it is ", name(weight_.scalar_type()));
    check_shape("projected", projected_, {K, batch, tokens, rank + 2 * states});
    check_shape("step_inv_scale", inv_scale_, {K, scales});
    check_shape("step_scale", scale_, {K, scales});
    check_shape("step_zero_point", zero_point_, {K, scales});
    check_shape("step_inv_smooth", inv_smooth_, {K, rank});
    check_shape("step_weight", weight_, {K, groups(channels), divided_up(rank, 64), 16, packed ? 32 : 64});
    check_shape("step_weight_sum", weight_sum_, {K, channels});
    check_shape("step_weight_scale", weight_scale_, {K, channels});
    check_shape("step_bias", bias_, {K, channels});
    check_shape("A", A_, {K, channels, states});
    check_shape("D", D_, {K, channels});
    check_shape("z", z_, {batch, tokens, channels});
    u = as_rows("u", u_), z = as_rows("z", z_), projected = floats("projected", projected_);
    inv_scale = floats("step_inv_scale", inv_scale_), scale = floats("step_scale", scale_);
    zero_point = zero_points("step_zero_point", zero_point_), inv_smooth = floats("step_inv_smooth", inv_smooth_);
    weight = as_contiguous(weight_), weight_sum = weight_sums("step_weight_sum", weight_sum_, rank);
    weight_scale = floats("step_weight_scale", weight_scale_), bias = floats("step_bias", bias_);
    A = floats("A", A_), D = floats("D", D_), order = orders(order_, tokens, false);

    scan.u = rows(u), scan.z = rows(z), scan.u_direction = u.size(0) > 1 ? u.stride(0) : 0;
    scan.projected = in<float>(projected);
    scan.step = {in<float>(inv_scale), in<int32_t>(zero_point), in<float>(inv_smooth), scales,
                 lowest(bits),         -lowest(bits) - 1};
    scan.step_scale = in<float>(scale);
    scan.step_weight = weight.const_data_ptr(), scan.packed = packed;
    scan.step_weight_sum = in<int32_t>(weight_sum), scan.step_weight_scale = in<float>(weight_scale);
    scan.step_bias = in<float>(bias), scan.A = in<float>(A), scan.D = in<float>(D), scan.order = in<int32_t>(order);
    scan.directions = K, scan.batch = batch, scan.tokens = tokens, scan.steps = order.size(1);
    scan.channels = channels, scan.rank = rank, scan.states = states;
    scan.factor = static_cast<float>(factor), scan.merge = merge;
  }
};

Tensor directional_scan(Tensor u, Tensor projected, Tensor step_inv_scale, Tensor step_scale, Tensor step_zero_point,
                        Optional step_inv_smooth, int64_t step_bits, Tensor step_weight, Tensor step_weight_sum,
                        Tensor step_weight_scale, Tensor step_bias, Tensor A, Optional D, Optional z, Tensor order,
                        bool merge, double factor) {
  DirectionalInputs s(u, projected, step_inv_scale, step_scale, step_zero_point, step_inv_smooth, step_bits,
                      step_weight, step_weight_sum, step_weight_scale, step_bias, A, D, z, order, merge, factor);
  const DirectionalScan& q = s.scan;
  Tensor y = merge ? make(s.u, {q.batch, q.tokens, q.channels}, s.u.scalar_type())
                   : make(s.u, {q.directions, q.batch, q.tokens, q.channels}, s.u.scalar_type());
  s.scan.y = y.mutable_data_ptr(), s.scan.y_type = float_type(y), s.scan.codes = nullptr;
  run(s.scan, u);
  return typed(y, u);
}

Tensor directional_scan_quantize(Tensor u, Tensor projected, Tensor step_inv_scale, Tensor step_scale,
                                 Tensor step_zero_point, Optional step_inv_smooth, int64_t step_bits,
                                 Tensor step_weight, Tensor step_weight_sum, Tensor step_weight_scale, Tensor step_bias,
                                 Tensor A, Optional D, Optional z, Tensor order, double factor, Tensor inv_scale,
                                 Tensor zero_point, Optional inv_smooth, int64_t bits) {
  DirectionalInputs s(u, projected, step_inv_scale, step_scale, step_zero_point, step_inv_smooth, step_bits,
                      step_weight, step_weight_sum, step_weight_scale, step_bias, A, D, z, order, true, factor);
  DirectionalScan& q = s.scan;
  const int64_t scales = inv_scale.numel();
  PTQ4VM_CHECK(scales == q.tokens || scales == 1, "token scales were calibrated for ", scales,
               " tokens, the input has ", q.tokens, "; calibrate at this resolution or use Granularity.PER_TENSOR");
  check_shape("inv_scale", inv_scale, {scales});
  check_shape("zero_point", zero_point, {scales});
  check_shape("inv_smooth", inv_smooth, {q.channels});
  const Codes codes(inv_scale, zero_point, inv_smooth, bits, scales);
  Tensor result = make(s.u, {q.batch, q.tokens, q.channels}, ScalarType::Char);
  q.codes = out<int8_t>(result), q.y = nullptr, q.qparams = codes.view();
  run(q, u);
  return result;
}

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(PTQ4VM_LIBRARY, PTQ4VM_KEY, m) {
  PTQ4VM_IMPL(m, selective_scan);
  PTQ4VM_IMPL(m, directional_scan);
  PTQ4VM_IMPL(m, directional_scan_quantize);
}
