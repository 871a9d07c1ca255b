// The weights of depth-wise convolutions, as the vectors that their kernels read.
#pragma once

#include <algorithm>

#include "vec.h"

namespace ptq4vm {
namespace {

// weight (channels, taps) → a vector for each tap, of as many channels as there are lanes; zeros where there are none.
inline void load_taps(const float* weight, int64_t taps, int64_t channels, f32xw* vectors) {
  for (int64_t k = 0; k < taps; k++) {
    float lanes[WIDTH] = {};
    for (int64_t i = 0; i < std::min(WIDTH, channels); i++) lanes[i] = weight[i * taps + k];
    vectors[k] = load_as<f32xw>(lanes);
  }
}

}  // namespace
}  // namespace ptq4vm
