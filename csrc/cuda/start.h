// How an operator starts its kernels, and the error when that fails.
#pragma once

#include <stdexcept>

#include "../bindings/tensors.h"
#include "toolkit.h"

namespace ptq4vm::cuda {

// Calls start(stream) with the device of `on` current and its current stream.
template <class F>
void launch(const Tensor& on, F start) {
  const int device = on.get_device_index();
  const auto current = use_device(device);
  std::string problem;
  try {
    start(current_stream(device));
    if (const char* error = take_error()) {
      problem = std::string(error) + " (or an earlier kernel failed: CUDA_LAUNCH_BLOCKING=1 shows which)";
    }
  } catch (const std::length_error& error) {  // from device.cuh
    problem = error.what();
  }
  PTQ4VM_CHECK(problem.empty(), " on GPU ", device, ": ", problem);
}

}  // namespace ptq4vm::cuda
