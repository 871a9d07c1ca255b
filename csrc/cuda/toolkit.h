// What the glue asks of the CUDA toolkit and of torch's streams; the emulator has its own.
#pragma once

#include <memory>

#include "launch.h"

namespace ptq4vm {
namespace cuda {

std::shared_ptr<void> use_device(int device);  // makes it torch's current one and this library's, as long as this lives
Stream current_stream(int device);             // torch's
int capability(int device);                    // 10 * major + minor
const char* take_error();                      // of what was launched before, or null

}  // namespace cuda
}  // namespace ptq4vm
