// Chooses the kernel of a linear, of those that the library has: PTQ4VM_NO_S4 and PTQ4VM_SM90 say which.
#include "linear.h"

namespace ptq4vm::cuda {

bool linear(const LinearProblem& p, bool nibbles, int capability, Stream stream) {
#ifdef PTQ4VM_NO_S4
  if (nibbles) return false;
#else
  if (nibbles) return multiplies_nibbles(capability) && linear_s4(p, stream);
#endif
#ifdef PTQ4VM_SM90
  if (capability == 90 && linear_s8_sm90(p, stream)) return true;
#endif
  return linear_s8(p, stream);
}

}  // namespace ptq4vm::cuda
