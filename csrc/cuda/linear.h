// The integer linears on tensor cores: ops.linear_packed, and ops.linear_gelu_quantize where there are codes.
#pragma once

#include "launch.h"

namespace ptq4vm::cuda {

// K directions, one after the other in every array. Codes of x and of the weight are int8, or for linear_s4 two of 4
// bits a byte, low nibble first. D is padded to `channels`, a multiple of 16, or of 32 for linear_s4; x and weight
// start at a multiple of 16 bytes. The weight's padding is zeros; that of x may be anything. All else needs only its
// type's alignment, and N is any: where it is a multiple of 8 and addresses are of 16, results are stored in vectors.
struct LinearProblem {
  const void* x;              // (K, rows, channels)
  const float* x_scale;       // (K, scales); row r has the one at r % scales
  const int32_t* zero_point;  // (K, scales)
  const void* weight;         // (K, N, channels)
  const int32_t* weight_sum;  // (K, N), of each row's codes
  const float* weight_scale;  // (K, N)
  const float* bias;          // (K, N) or null
  void* y;                    // (K, rows, N); not written where there are codes
  Float y_type;
  uint8_t* codes;  // (rows, codes_row) bytes, or null; behind a row's N codes nothing is written
  bool nibbles;    // codes are two a byte, the last one of an odd N with zero
  int64_t codes_row;
  QParams qparams;  // of codes
  int64_t directions, rows, scales, channels, features;
};

// Fewer than 2^31 rows, at most 65535 directions, and one for codes.
inline bool fits_a_launch(const LinearProblem& p) {
  constexpr int64_t MAX_SIZE = INT32_MAX - 256, MAX_DIRECTIONS = 65535;
  if (p.rows > MAX_SIZE || p.features > MAX_SIZE || p.channels > MAX_SIZE || p.directions > MAX_DIRECTIONS)
    return false;
  return !p.codes || p.directions <= 1;
}

// Returns whether the kernel takes the problem; one that does not has started nothing. linear_s8 takes all that fit a
// launch, and runs on every GPU from compute capability 8.0 on. linear_s4 is for 8.0 to 8.9: other GPUs do not multiply
// nibbles, and run the same codes as bytes. linear_s8_sm90 is for 9.0 only.
bool linear_s8(const LinearProblem&, Stream);
bool linear_s4(const LinearProblem&, Stream);
bool linear_s8_sm90(const LinearProblem&, Stream);

// Returns whether a GPU's codes of up to 4 bits are nibbles; `capability` is 10 * major + minor.
constexpr bool multiplies_nibbles(int capability) { return capability >= 80 && capability < 90; }

// The fastest of these. `nibbles` says how the codes of x and of the weight are given.
bool linear(const LinearProblem&, bool nibbles, int capability, Stream);

}  // namespace ptq4vm::cuda
