// Which instruction set the operators run on.
#include <torch/csrc/stable/library.h>

#include <string>

#include "kernels.h"

namespace ptq4vm {
namespace {

// Chooses an instruction set for what follows, at most the best one ("" chooses none); gives the one in use.
std::string use_isa_named(std::string wanted) {
  for (int i = 0; i <= static_cast<int>(best_isa()); i++) {
    if (wanted == name(static_cast<Isa>(i))) use_isa(static_cast<Isa>(i));
  }
  return name(isa());
}

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CompositeExplicitAutograd, m) {
  m.impl("_use_isa", TORCH_BOX(&ptq4vm::use_isa_named));
}
