// What every instruction set implements, and how one is chosen. Pointers are to contiguous memory; the glue in ops.cpp
// has checked shapes and types. A kernel does the part [begin, end) of its work, and what it gives does not depend on
// how the work was divided.
#pragma once

#include <cstdint>

namespace ptq4vm {

enum class Float { f32, bf16 };

// reference.quantize: x (rows, D) → codes (rows, D). Qparams belong to a row r: the one at r % scales.
struct Quantize {
  const void* x;
  Float x_type;
  const float* inv_scale;
  const int32_t* zero_point;
  const float* inv_smooth;  // (D,) or null
  int8_t* codes;
  int64_t rows, channels, scales;
  int low, high;
};

// reference.linear: codes (rows, D) with qparams as above, weight int8 (N, D) or two 4-bit codes a byte (N, ceil(D / 2)).
struct Linear {
  const int8_t* x;
  const float* x_scale;
  const int32_t* zero_point;
  const void* weight;
  bool packed;
  const float* weight_scale;  // (N,)
  const float* bias;          // (N,) or null
  void* y;
  Float y_type;
  int64_t rows, channels, features, scales;
};

// reference.selective_scan: u, delta, z, y (B, L, E); A (E, S); B, C (B, L, S); D, delta_bias (E,). All float32.
struct Scan {
  const float *u, *delta, *A, *B, *C;
  const float *D, *z, *delta_bias;  // or null
  float* y;
  int64_t batch, tokens, channels, states;
  bool softplus;
};

// Its adjoint. Gradients of what is shared between images are written for every image, and summed by the caller:
// A (batch, E, S), D and delta_bias (batch, E).
struct ScanBackward {
  Scan forward;  // y unused
  const float* grad;
  float *u, *delta, *A, *B, *C;
  float *D, *z, *delta_bias;  // or null
};

// reference.causal_conv1d: x, y (B, L, E); weight (E, taps); bias (E,) or null. All float32.
struct Conv {
  const float *x, *weight, *bias;
  float* y;
  int64_t batch, tokens, channels, taps;
  bool silu;
};

// Its adjoint; gradients of weight (batch, E, taps) and bias (batch, E) are written for every image.
struct ConvBackward {
  Conv forward;  // y unused
  const float* grad;
  float *x, *weight, *bias;  // bias or null
};

// reference.fake_quantize: x, y (rows, D); qparams of a row as above. Without zero points codes are symmetric and x is
// divided by the scale, as weights are; with them it is multiplied by its reciprocal.
struct FakeQuantize {
  const float *x, *smooth;  // smooth (D,) or null
  const float* scale;
  const int32_t* zero_point;  // or null
  float* y;
  int64_t rows, channels, scales;
  int low, high;
};

// Its gradients, each null where nobody asks. The scale's is written for every row, the smoothing's (D,) for every
// block of ROWS_IN_SUM rows, and the caller sums them.
struct FakeQuantizeBackward {
  FakeQuantize forward;  // y unused
  const float* grad;
  float *x, *scale, *smooth;
};

constexpr int64_t ROWS_IN_SUM = 32;

constexpr int64_t ROWS_IN_BLOCK = 512, FEATURES_IN_BLOCK = 64;

struct Kernels {
  void (*quantize)(const Quantize&, int64_t begin, int64_t end);            // rows
  void (*linear)(const Linear&, int64_t begin, int64_t end);                // feature blocks × row blocks
  void (*scan)(const Scan&, int64_t begin, int64_t end);                    // images × groups of LANES channels
  void (*scan_backward)(const ScanBackward&, int64_t begin, int64_t end);   // images
  void (*conv)(const Conv&, int64_t begin, int64_t end);                    // images × groups of LANES channels
  void (*conv_backward)(const ConvBackward&, int64_t begin, int64_t end);   // images × groups of LANES channels
  void (*fake_quantize)(const FakeQuantize&, int64_t begin, int64_t end);                    // rows
  void (*fake_quantize_backward)(const FakeQuantizeBackward&, int64_t begin, int64_t end);   // blocks of ROWS_IN_SUM
};

// Instruction sets, each with all before it.
enum class Isa { portable, avx2, vnni, amx };

const char* name(Isa);
Isa best_isa();              // of this machine, as far as it was compiled in and PTQ4VM_ISA allows
Isa isa();                   // in use
void use_isa(Isa);           // at most best_isa()
const Kernels& kernels();    // of the one in use

}  // namespace ptq4vm
