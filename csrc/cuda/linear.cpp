// Which kernel runs a linear. PTQ4VM_SM90 says that the library has the one for compute capability 9.0.
#include "linear.h"

namespace ptq4vm {
namespace cuda {

bool linear(const LinearProblem& p, bool nibbles, int capability, Stream stream) {
  if (nibbles) return multiplies_nibbles(capability) && linear_s4(p, stream);
#ifdef PTQ4VM_SM90
  if (capability == 90 && linear_s8_sm90(p, stream)) return true;
#endif
  return linear_s8(p, stream);
}

}  // namespace cuda
}  // namespace ptq4vm
