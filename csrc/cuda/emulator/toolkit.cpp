// No device; the compute capability and the stream are those that a test asks for.
#include "../toolkit.h"

#include <climits>
#include <stdexcept>

namespace ptq4vm {
namespace cuda {
namespace {

constexpr int NONE = INT_MIN;

int emulated = 80, used = NONE;
Stream stream = nullptr;

// What holds for current is forgotten after every operator, since others may change it.
void check(int device) {
  if (device != used) throw std::logic_error("the device was not made current");
}

}  // namespace

void use_device(int device) { used = device; }

Stream current_stream(int device) {
  check(device);
  return stream;
}

int capability(int device) {
  check(device);
  return emulated;
}

const char* take_error() {
  used = NONE;
  return nullptr;
}

}  // namespace cuda
}  // namespace ptq4vm

extern "C" void ptq4vm_emulate(int capability, void* stream) {
  ptq4vm::cuda::emulated = capability;
  ptq4vm::cuda::stream = stream;
}
