// The scans: ops.selective_scan, ops.directional_scan and directional_scan_quantize.
#include "run.h"
#include "scan_inputs.h"

// Arguments named step_… are the integer linear that computes Δ, dt here: saved graphs have these names.
#define PTQ4VM_DIRECTIONAL                                                                         \
  "Tensor u, Tensor projected, Tensor step_inv_scale, Tensor step_scale, Tensor step_zero_point, " \
  "Tensor? step_inv_smooth, int step_bits, Tensor step_weight, Tensor step_weight_sum, "           \
  "Tensor step_weight_scale, Tensor step_bias, Tensor A, Tensor? D, Tensor? z, Tensor order"

namespace ptq4vm {
namespace {

Tensor selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z, Optional bias,
                      bool softplus) {
  ScanInputs s(u, delta, A, B, C, D, z, bias, softplus);
  Tensor y = empty_result(0, s.u, s.u.scalar_type());
  if (s.type == ScalarType::Double) {
    if (y.numel()) float64::scan(float64::Scan(s), mutable_ptr<double>(y));
    return y;
  }
  s.scan.y = y.mutable_data_ptr(), s.scan.y_type = float_type(y);
  run(u, s.scan);
  return cast_like(y, u);
}

// The inputs of a directional scan, checked, and the scan without its results.
struct DirectionalInputs {
  Tensor u, projected, inv_scale, scale, zero_point;
  Optional inv_smooth;
  int64_t bits;
  Tensor weight, weight_sum, weight_scale, bias, A;
  Optional D, z;
  Tensor order;
  DirectionalScan scan = {};

  DirectionalInputs(const Tensor& u_, const Tensor& projected_, const Tensor& inv_scale_, const Tensor& scale_,
                    const Tensor& zero_point_, const Optional& inv_smooth_, int64_t bits_, const Tensor& weight_,
                    const Tensor& weight_sum_, const Tensor& weight_scale_, const Tensor& bias_, const Tensor& A_,
                    const Optional& D_, const Optional& z_, const Tensor& order_, double factor)
      : u(u_), projected(projected_), inv_scale(inv_scale_), scale(scale_), zero_point(zero_point_),
        inv_smooth(inv_smooth_), bits(bits_), weight(weight_), weight_sum(weight_sum_), weight_scale(weight_scale_),
        bias(bias_), A(A_), D(D_), z(z_), order(order_) {
    scan.factor = static_cast<float>(factor);
    check(), convert();
  }

  void check() {
    check_axes("u", u, 4, "(K, B, L, E)"), check_axes("projected", projected, 4, "(K, B, L, R + 2 S)");
    check_axes("A", A, 3, "(K, E, S)"), check_axes("order", order, 2, "(K, T)");
    const int64_t directions = order.size(0), batch = u.size(1), tokens = u.size(2), channels = u.size(3);
    const int64_t states = A.size(2), rank = projected.size(3) - 2 * states;
    const int64_t scales = inv_scale.dim() == 2 ? inv_scale.size(1) : 0;
    scan.directions = directions, scan.batch = batch, scan.tokens = tokens, scan.length = order.size(1);
    scan.channels = channels, scan.rank = rank, scan.states = states;
    check_bits(bits);
    PTQ4VM_CHECK(directions >= 1, "the order (K, T) has no direction");
    PTQ4VM_CHECK(u.size(0) == directions || u.size(0) == 1, "u has ", u.size(0), " directions, the order ", directions);
    PTQ4VM_CHECK(1 <= rank && rank <= 512, "projected has ", projected.size(3), " channels: with ", states,
                 " states that leaves ", rank, " for the step, which must be between 1 and 512");
    check_token_scales(scales, tokens, "the step's");
    const bool packed = scan.packed = weight.scalar_type() == ScalarType::Byte;
    PTQ4VM_CHECK(packed || weight.scalar_type() == ScalarType::Char,
                 "step_weight must be int8, or uint8 with two 4-bit codes a byte, it is ", name(weight.scalar_type()));
    check_shape("projected", projected, {directions, batch, tokens, rank + 2 * states});
    check_shape("step_inv_scale", inv_scale, {directions, scales});
    check_shape("step_scale", scale, {directions, scales});
    check_shape("step_zero_point", zero_point, {directions, scales});
    check_shape("step_inv_smooth", inv_smooth, {directions, rank});
    check_shape("step_weight", weight,
                {directions, groups(channels), divided_up(rank, K_TILE), LANES, packed ? K_TILE / 2 : K_TILE});
    check_shape("step_weight_sum", weight_sum, {directions, channels});
    check_shape("step_weight_scale", weight_scale, {directions, channels});
    check_shape("step_bias", bias, {directions, channels});
    check_shape("A", A, {directions, channels, states});
    check_shape("D", D, {directions, channels});
    check_shape("z", z, {batch, tokens, channels});
  }

  // To what kernels read.
  void convert() {
    u = as_rows("u", u), z = as_rows("z", z), projected = floats("projected", projected);
    inv_scale = floats("step_inv_scale", inv_scale), scale = floats("step_scale", scale);
    zero_point = zero_points("step_zero_point", zero_point), inv_smooth = floats("step_inv_smooth", inv_smooth);
    weight = to_contiguous(weight), weight_sum = weight_sums("step_weight_sum", weight_sum, scan.rank);
    weight_scale = floats("step_weight_scale", weight_scale), bias = floats("step_bias", bias);
    A = floats("A", A), D = floats("D", D), order = orders(order, scan.tokens, false);
    scan.u = rows(u), scan.z = rows(z), scan.u_direction = u.size(0) > 1 ? u.stride(0) : 0;
    scan.projected = const_ptr<float>(projected), scan.order = const_ptr<int32_t>(order);
    scan.dt_qparams = {.inv_scale = const_ptr<float>(inv_scale),
                       .zero_point = const_ptr<int32_t>(zero_point),
                       .inv_smooth = const_ptr<float>(inv_smooth),
                       .scales = inv_scale.size(1),
                       .low = lowest(bits),
                       .high = highest(bits)};
    scan.dt_scale = const_ptr<float>(scale), scan.dt_bias = const_ptr<float>(bias);
    scan.dt_weight = weight.const_data_ptr(), scan.dt_weight_sum = const_ptr<int32_t>(weight_sum);
    scan.dt_weight_scale = const_ptr<float>(weight_scale);
    scan.A = const_ptr<float>(A), scan.D = const_ptr<float>(D);
  }
};

Tensor directional_scan(Tensor u, Tensor projected, Tensor inv_scale, Tensor scale, Tensor zero_point,
                        Optional inv_smooth, int64_t bits, Tensor weight, Tensor weight_sum, Tensor weight_scale,
                        Tensor bias, Tensor A, Optional D, Optional z, Tensor order, bool merge, double factor) {
  DirectionalInputs s(u, projected, inv_scale, scale, zero_point, inv_smooth, bits, weight, weight_sum, weight_scale,
                      bias, A, D, z, order, factor);
  DirectionalScan& scan = s.scan;
  std::vector<int64_t> sizes{scan.directions, scan.batch, scan.tokens, scan.channels};
  if (merge) sizes.erase(sizes.begin());
  Tensor y = empty_result(0, s.u, sizes, s.u.scalar_type());
  scan.merge = merge, scan.y = y.mutable_data_ptr(), scan.y_type = float_type(y);
  const Optional memory = workspace(scan, u);
  run(u, scan);
  return cast_like(y, u);
}

Tensor directional_scan_quantize(Tensor u, Tensor projected, Tensor dt_inv_scale, Tensor dt_scale, Tensor dt_zero_point,
                                 Optional dt_inv_smooth, int64_t dt_bits, Tensor weight, Tensor weight_sum,
                                 Tensor weight_scale, Tensor bias, Tensor A, Optional D, Optional z, Tensor order,
                                 double factor, Tensor inv_scale, Tensor zero_point, Optional inv_smooth,
                                 int64_t bits) {
  DirectionalInputs s(u, projected, dt_inv_scale, dt_scale, dt_zero_point, dt_inv_smooth, dt_bits, weight, weight_sum,
                      weight_scale, bias, A, D, z, order, factor);
  const int64_t scales = inv_scale.numel();
  DirectionalScan& scan = s.scan;
  check_token_scales(scales, scan.tokens);
  check_shape("inv_scale", inv_scale, {scales});
  check_shape("zero_point", zero_point, {scales});
  check_shape("inv_smooth", inv_smooth, {scan.channels});
  const OutputQParams qparams(inv_scale, zero_point, inv_smooth, bits, scales);
  Tensor codes = empty_result(0, s.u, {scan.batch, scan.tokens, scan.channels}, ScalarType::Char);
  scan.merge = true, scan.codes = mutable_ptr<int8_t>(codes), scan.qparams = qparams.view();
  const Optional memory = workspace(scan, u);
  run(u, scan);
  return codes;
}

}  // namespace
}  // namespace ptq4vm

PTQ4VM_IMPL(selective_scan, "(" PTQ4VM_SCAN ") -> Tensor", LIKE_INPUT)
PTQ4VM_IMPL(directional_scan, "(" PTQ4VM_DIRECTIONAL ", bool merge, float factor) -> Tensor", LIKE_INPUT)
PTQ4VM_IMPL(directional_scan_quantize, "(" PTQ4VM_DIRECTIONAL ", float factor, " PTQ4VM_QPARAMS ") -> Tensor", INT8)
