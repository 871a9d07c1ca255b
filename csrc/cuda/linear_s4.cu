// Nibble by nibble, compiled for compute capability 8.0 to 8.9 only: later GPUs emulate this mma with hundreds of
// others.
#include "gemm.cuh"

namespace ptq4vm {
namespace cuda {

bool linear_s4(const LinearProblem& p, Stream stream) { return launch_linear<cutlass::int4b_t>(p, stream); }

}  // namespace cuda
}  // namespace ptq4vm
