// One host function per operator: it starts the kernels on a stream of the current device and returns at once. Pointers
// are to that device's memory, but for what operators.h has by value or as a Rotation. No allocation, no
// synchronisation, no state; an operator without rows starts nothing. Whoever calls asks cudaGetLastError afterwards.
// Where a block needs more shared memory than the device has, std::length_error is thrown.
#pragma once

#include "../operators.h"

namespace ptq4vm::cuda {

using Stream = void*;  // a cudaStream_t

#define PTQ4VM_OPERATOR(Operator, items, numbers) void run(const Operator&, Stream);
#define PTQ4VM_CPU_OPERATOR(Operator, items, numbers)
#include "../operators.def"

int64_t directional_scan_sums(const DirectionalScan&);  // the floats that its `sums` needs, often none

}  // namespace ptq4vm::cuda
