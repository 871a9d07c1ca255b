// The kernels of one instruction set, under its name.
#include "kernels.h"

#define PTQ4VM_JOIN_(a, b) a##b
#define PTQ4VM_JOIN(a, b) PTQ4VM_JOIN_(a, b)

namespace ptq4vm {
namespace {

constexpr Kernels TABLE{
#define PTQ4VM_OPERATOR(Operator, items, numbers) PTQ4VM_SET::run,
#define PTQ4VM_CPU_OPERATOR PTQ4VM_OPERATOR
#include "../operators.def"
};

}  // namespace

const Kernels& PTQ4VM_JOIN(kernels_, PTQ4VM_SET)() { return TABLE; }

#ifdef __AVX512VNNI__
const Kernels& kernels_amx() {
  static const Kernels table = [] {
    Kernels kernels = TABLE;
    kernels.of_Linear = PTQ4VM_SET::run_amx;
    return kernels;
  }();
  return table;
}
#endif

}  // namespace ptq4vm
