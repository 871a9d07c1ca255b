#include "toolkit.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace ptq4vm::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  STD_TORCH_CHECK(error == cudaSuccess, "GPU ", device, ": ", cudaGetErrorString(error));
  return value;
}

std::string architectures() { return PTQ4VM_ARCHITECTURES; }

STABLE_TORCH_LIBRARY_FRAGMENT(ptq4vm, m) { m.def("_cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CompositeExplicitAutograd, m) {
  m.impl("_cuda_architectures", TORCH_BOX(&architectures));
}

}  // namespace

Stream current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "torch has no current stream of GPU ", device);
  return stream;
}

// The toolkit is linked statically, and what it holds for current is not what torch's one does.
std::shared_ptr<void> use_device(int device) {
  auto guard = std::make_shared<torch::stable::accelerator::DeviceGuard>(device);
  const cudaError_t error = cudaSetDevice(device);
  STD_TORCH_CHECK(error == cudaSuccess, "GPU ", device, ": ", cudaGetErrorString(error));
  return guard;
}

int capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

const char* take_error() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return nullptr;
  if (error == cudaErrorNoKernelImageForDevice) {
    return "this library was built for " PTQ4VM_ARCHITECTURES
           ", and not for this GPU; build it again with its compute "
           "capability in TORCH_CUDA_ARCH_LIST";
  }
  return cudaGetErrorString(error);
}

}  // namespace ptq4vm::cuda
