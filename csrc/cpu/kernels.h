// The kernels of the CPU for every instruction set.
#pragma once

#include "../operators.h"
#include "linear_problem.h"

namespace ptq4vm {

// kernels().of(q) is the kernel of the operator that q is.
struct Kernels {
#define PTQ4VM_OPERATOR(Operator, items, numbers)                     \
  void (*of_##Operator)(const Operator&, int64_t begin, int64_t end); \
  auto of(const Operator&) const { return of_##Operator; }
#define PTQ4VM_CPU_OPERATOR PTQ4VM_OPERATOR
#include "../operators.def"
};

#ifdef PTQ4VM_SET
namespace PTQ4VM_SET {
#define PTQ4VM_OPERATOR(Operator, items, numbers) void run(const Operator&, int64_t begin, int64_t end);
#define PTQ4VM_CPU_OPERATOR PTQ4VM_OPERATOR
#include "../operators.def"

void run_amx(const Linear&, int64_t begin, int64_t end);  // where there is VNNI
}  // namespace PTQ4VM_SET
#endif

const Kernels& kernels();  // of the instruction set in use

// Chooses an instruction set for what follows, at most the best one ("" chooses none); returns the one in use.
const char* use_isa(const char* wanted);

}  // namespace ptq4vm
