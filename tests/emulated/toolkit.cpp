// No device; the compute capabilities and the streams are those that a test asks for.
#include "toolkit.h"

#include <climits>
#include <map>
#include <stdexcept>

namespace ptq4vm::cuda {
namespace {

struct Gpu {
  int capability = 80;
  Stream stream = nullptr;
};

constexpr int NONE = INT_MIN;

std::map<int, Gpu> gpus;  // by the index of the device, which is -1 for tensors of the CPU
int used = NONE;

Gpu& gpu(int device) {
  if (device != used) throw std::logic_error("the device was not made current");
  return gpus[device];
}

}  // namespace

std::shared_ptr<void> use_device(int device) {
  used = device;
  return {nullptr, [](void*) { used = NONE; }};
}

Stream current_stream(int device) { return gpu(device).stream; }
int capability(int device) { return gpu(device).capability; }
const char* take_error() { return nullptr; }

}  // namespace ptq4vm::cuda

extern "C" void ptq4vm_emulate(int device, int capability, void* stream) {
  ptq4vm::cuda::gpus[device] = {capability, stream};
}
