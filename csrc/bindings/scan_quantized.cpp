// The scan whose states are codes, which only the CPU has.
#include "run.h"
#include "scan_inputs.h"

namespace ptq4vm {
namespace {

Tensor selective_scan_quantized(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z,
                                Optional bias, bool softplus, Tensor state_scale, Tensor state_inv_scale,
                                int64_t bits) {
  ScanInputs s(u, delta, A, B, C, D, z, bias, softplus);
  check_bits(bits);
  const int64_t scales = state_scale.numel();
  check_shape("state_scale", state_scale, {scales});
  PTQ4VM_CHECK(scales == s.scan.tokens || scales == 1, "state scales were calibrated for ", scales,
               " tokens, the input has ", s.scan.tokens, "; calibrate at this resolution");
  check_shape("state_inv_scale", state_inv_scale, {scales});
  state_scale = floats("state_scale", state_scale, s.type);
  state_inv_scale = floats("state_inv_scale", state_inv_scale, s.type);
  Tensor y = empty_result(0, s.u, s.u.scalar_type());
  if (s.type == ScalarType::Double) {
    float64::Scan scan(s);
    scan.state_scale = const_ptr<double>(state_scale), scan.state_inv_scale = const_ptr<double>(state_inv_scale);
    scan.scales = scales, scan.low = lowest(bits), scan.high = highest(bits);
    if (y.numel()) float64::scan(scan, mutable_ptr<double>(y));
    return y;
  }
  s.scan.y = y.mutable_data_ptr(), s.scan.y_type = float_type(y);
  run(u, QuantizedScan{.scan = s.scan,
                       .state_scale = const_ptr<float>(state_scale),
                       .state_inv_scale = const_ptr<float>(state_inv_scale),
                       .scales = scales,
                       .low = lowest(bits),
                       .high = highest(bits)});
  return cast_like(y, u);
}

}  // namespace
}  // namespace ptq4vm

PTQ4VM_IMPL(selective_scan_quantized,
            "(" PTQ4VM_SCAN ", Tensor state_scale, Tensor state_inv_scale, int bits) -> Tensor", LIKE_INPUT)
