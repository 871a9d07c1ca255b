// Nibble by nibble, compiled for compute capability 8.0 to 8.9 only: later GPUs emulate this mma with hundreds of
// others.
#include "gemm.cuh"

namespace ptq4vm::cuda {

bool linear_s4(const LinearProblem& p, Stream stream) { return launch_linear<cutlass::int4b_t>(p, stream); }

}  // namespace ptq4vm::cuda
