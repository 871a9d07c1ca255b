// The kernels, on the current stream of the tensors' device.
#include "../run.h"

#include "start.h"

namespace ptq4vm {

void run(const Quantize& q, const Tensor& on) {
  cuda::launch("quantize", on, [&](cuda::Stream stream) { cuda::quantize(q, stream); });
}

void run(const ChooseQparams& q, const Tensor& on) {
  cuda::launch("choose_qparams", on, [&](cuda::Stream stream) { cuda::choose_qparams(q, stream); });
}

void run(const Dequantize& q, const Tensor& on) {
  cuda::launch("dequantize", on, [&](cuda::Stream stream) { cuda::dequantize(q, stream); });
}

void run(const Rotate& q, const Tensor& on) {
  cuda::launch("rotate", on, [&](cuda::Stream stream) { cuda::rotate(q, stream); });
}

void run(const RotateQuantize& q, const Tensor& on) {
  cuda::launch("rotate_quantize", on, [&](cuda::Stream stream) { cuda::rotate_quantize(q, stream); });
}

void run(const NormQuantize& q, const Tensor& on) {
  cuda::launch("norm_quantize", on, [&](cuda::Stream stream) { cuda::norm_quantize(q, stream); });
}

void run(const Conv& q, const Tensor& on) {
  cuda::launch(q.codes ? "conv1d_quantize" : "causal_conv1d", on, [&](cuda::Stream stream) { cuda::conv(q, stream); });
}

void run(const Conv2d& q, const Tensor& on) {
  cuda::launch("conv2d_quantize", on, [&](cuda::Stream stream) { cuda::conv2d(q, stream); });
}

void run(const Scan& q, const Tensor& on) {
  cuda::launch("selective_scan", on, [&](cuda::Stream stream) { cuda::scan(q, stream); });
}

void run(DirectionalScan q, const Tensor& on) {
  Tensor sums = make(on, {cuda::directional_scan_sums(q)}, ScalarType::Float);
  q.sums = out<float>(sums);
  cuda::launch(q.codes ? "directional_scan_quantize" : "directional_scan", on,
               [&](cuda::Stream stream) { cuda::directional_scan(q, stream); });
}

Tensor causal_conv1d_in_float64(const Tensor&, const Tensor&, const Optional&, bool) {
  PTQ4VM_CHECK(false, "ptq4vm::causal_conv1d has no float64 on a GPU: use float32, or move the tensors to the CPU");
}

Tensor selective_scan_in_float64(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Optional&, const Optional&, const Optional&, bool) {
  PTQ4VM_CHECK(false, "ptq4vm::selective_scan has no float64 on a GPU: use float32, or move the tensors to the CPU");
}

}  // namespace ptq4vm
