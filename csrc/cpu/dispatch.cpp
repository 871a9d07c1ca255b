// The choice of the instruction set that runs: the best that the machine has, or the one that PTQ4VM_ISA names.
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(PTQ4VM_HAS_vnni) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ptq4vm {

const Kernels& kernels_portable();
const Kernels& kernels_avx2();
const Kernels& kernels_vnni();
const Kernels& kernels_amx();

namespace {

enum Isa { portable, avx2, vnni, amx };  // each with all before it
constexpr const char* NAMES[] = {"portable", "avx2", "vnni", "amx"};

Isa probe() {
#ifdef PTQ4VM_HAS_vnni
  __builtin_cpu_init();
  const bool has_vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
#ifdef __linux__
  // A process on Linux gets the tile registers when it asks for them.
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  if (has_vnni && __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("avx512bf16") &&
      syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0) {
    return amx;
  }
#endif
  if (has_vnni) return vnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2;
#endif
  return portable;
}

// The best instruction set of this machine, as far as it was compiled in and PTQ4VM_ISA allows.
int best_isa() {
  static const int value = [] {
    const int best = probe();
    const char* wanted = std::getenv("PTQ4VM_ISA");
    for (int i = 0; wanted && i < best; i++) {
      if (std::strcmp(wanted, NAMES[i]) == 0) return i;
    }
    return best;
  }();
  return value;
}

std::atomic<int>& chosen_isa() {
  static std::atomic<int> value{best_isa()};
  return value;
}

}  // namespace

const char* use_isa(const char* wanted) {
  for (int i = 0; i <= best_isa(); i++) {
    if (std::strcmp(wanted, NAMES[i]) == 0) chosen_isa() = i;
  }
  return NAMES[chosen_isa()];
}

const Kernels& kernels() {
  switch (chosen_isa().load(std::memory_order_relaxed)) {
#ifdef PTQ4VM_HAS_vnni
    case amx: return kernels_amx();
    case vnni: return kernels_vnni();
    case avx2: return kernels_avx2();
#endif
    default: return kernels_portable();
  }
}

}  // namespace ptq4vm
