// The kernels that the library of a device brings to the bindings, for arguments that these have checked. `on` is a
// tensor of the operator, and says which device.
#pragma once

#include "qparams.h"
#ifdef PTQ4VM_ONNXRUNTIME
#include "../onnxruntime/registration.h"
#else
#include "registration.h"
#endif

namespace ptq4vm {

// void run(const Tensor& on, const Quantize&), and so on.
#define PTQ4VM_OPERATOR(Operator, items, numbers) void run(const Tensor& on, const struct Operator&);
#ifdef PTQ4VM_CUDA
#define PTQ4VM_CPU_OPERATOR(Operator, items, numbers)
#else
#define PTQ4VM_CPU_OPERATOR PTQ4VM_OPERATOR
#endif
#include "../operators.def"

// Sets what a device chooses: the panel of a CPU; the memory for sums of a GPU, which the result holds.
Optional workspace(DirectionalScan&, const Tensor& on);

}  // namespace ptq4vm
