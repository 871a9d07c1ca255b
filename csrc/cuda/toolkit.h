// The CUDA toolkit and torch's streams, as far as the bindings need them; the emulator (tests/emulated) has its own.
#pragma once

#include <memory>

#include "launch.h"

namespace ptq4vm::cuda {

std::shared_ptr<void> use_device(int device);  // makes it torch's current one and this library's, as long as this lives
Stream current_stream(int device);             // torch's
int capability(int device);                    // 10 * major + minor
const char* take_error();                      // of what was launched before, or null

}  // namespace ptq4vm::cuda
