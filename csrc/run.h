// What the library of a device brings to the glue: kernels for the arguments that the glue has checked. `on` is a
// tensor of the operator, and says which device.
#pragma once

#include "glue.h"

namespace ptq4vm {

void run(const Quantize&, const Tensor& on);
void run(const ChooseQparams&, const Tensor& on);
void run(const Dequantize&, const Tensor& on);
void run(const Rotate&, const Tensor& on);
void run(const RotateQuantize&, const Tensor& on);
void run(const NormQuantize&, const Tensor& on);
void run(const Conv&, const Tensor& on);
void run(const Conv2d&, const Tensor& on);
void run(const Scan&, const Tensor& on);
void run(DirectionalScan, const Tensor& on);  // `panel` and `sums` are still to be chosen

// float64, in plain loops; all else is computed in float32.
Tensor causal_conv1d_in_float64(const Tensor& x, const Tensor& weight, const Optional& bias, bool silu);
Tensor selective_scan_in_float64(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                 const Tensor& C, const Optional& D, const Optional& z, const Optional& bias,
                                 bool softplus);

}  // namespace ptq4vm
