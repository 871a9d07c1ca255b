// No device and no streams; the compute capability is the one that a test asks for.
#include "../toolkit.h"

namespace ptq4vm {
namespace cuda {
namespace {

int emulated = 80;

}  // namespace

Stream current_stream(int) { return nullptr; }
void use_device(int) {}
int capability(int) { return emulated; }
const char* take_error() { return nullptr; }

}  // namespace cuda
}  // namespace ptq4vm

extern "C" void ptq4vm_emulate(int capability) { ptq4vm::cuda::emulated = capability; }
