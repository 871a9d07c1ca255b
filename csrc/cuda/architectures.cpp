// The GPUs that the library has code for, as TORCH_CUDA_ARCH_LIST named them.
#include <torch/csrc/stable/library.h>

#include <string>

namespace ptq4vm {
namespace {

std::string cuda_architectures() { return PTQ4VM_ARCHITECTURES; }

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_FRAGMENT(ptq4vm, m) { m.def("_cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CompositeExplicitAutograd, m) {
  m.impl("_cuda_architectures", TORCH_BOX(&ptq4vm::cuda_architectures));
}
