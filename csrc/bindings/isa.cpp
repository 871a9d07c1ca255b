// The instruction set in use, as an operator of torch.
#include <torch/csrc/stable/library.h>

#include <string>

#include "../cpu/kernels.h"

namespace ptq4vm {
namespace {

std::string chosen_isa(std::string wanted) { return use_isa(wanted.c_str()); }

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_FRAGMENT(ptq4vm, m) { m.def("_use_isa(str name) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CompositeExplicitAutograd, m) { m.impl("_use_isa", TORCH_BOX(&ptq4vm::chosen_isa)); }
