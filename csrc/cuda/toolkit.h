// What the glue asks of the CUDA toolkit and of torch's streams; the emulator has its own.
#pragma once

#include "launch.h"

namespace ptq4vm {
namespace cuda {

Stream current_stream(int device);  // torch's
void use_device(int device);        // for what this library launches from this thread
int capability(int device);         // 10 * major + minor
const char* take_error();           // of what was launched before, or null

}  // namespace cuda
}  // namespace ptq4vm
