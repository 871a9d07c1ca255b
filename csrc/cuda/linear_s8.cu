// int8 by int8: every GPU from compute capability 8.0 on.
#include "gemm.cuh"

namespace ptq4vm::cuda {

bool linear_s8(const LinearProblem& p, Stream stream) { return launch_linear<int8_t>(p, stream); }

}  // namespace ptq4vm::cuda
