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

// A tensor (B, L, channels) that may be a part of a larger one: its channels are contiguous.
struct Rows {
  const void* data = nullptr;
  Float type = Float::f32;
  int64_t image = 0, row = 0;  // elements from one to the next
};

// reference.selective_scan: u, delta, z (B, L, E); B, C (B, L, S); contiguous A (E, S); D, delta_bias (E,); y (B, L, E).
struct Scan {
  Rows u, delta, B, C, z;  // z may have no data
  const float *A, *D, *delta_bias;  // the last two may be null
  void* y;
  Float y_type;
  int64_t batch, tokens, channels, states;
  bool softplus;
};

constexpr int64_t PANEL = 256;  // channels

// Its adjoint. Gradients of what is shared between images are written for every image, those of what is shared between
// channels for every panel of channels, and summed by the caller: A (batch, E, S), D and delta_bias (batch, E), B and C
// (panels, batch, L, S).
struct ScanBackward {
  Scan forward;  // y unused
  const float* grad;
  float *u, *delta, *A, *B, *C;
  float *D, *z, *delta_bias;  // or null
};

// fused.directional_scan, and fused.directional_scan_quantize where there are codes instead of y. Layouts as there; what
// is not of type Rows is contiguous.
struct DirectionalScan {
  Rows u, z;  // z may have no data
  int64_t u_direction;  // elements from one direction's u to the next one's; 0 where they share it
  const float* projected;
  const float *step_inv_scale, *step_scale;
  const int32_t* step_zero_point;
  const float* step_inv_smooth;  // or null
  int step_low, step_high;
  const void* step_weight;
  bool packed;  // two 4-bit codes a byte
  const int32_t* step_weight_sum;
  const float *step_weight_scale, *step_bias, *A, *D;  // D may be null
  const int32_t* order;  // of every direction, `steps` tokens or -1
  int64_t directions, batch, tokens, steps, channels, rank, states, step_scales;
  float factor;
  bool merge;
  void* y;
  Float y_type;
  int8_t* codes;
  const float* inv_scale;
  const int32_t* zero_point;
  const float* inv_smooth;  // or null
  int low, high;
  int64_t scales;
  int64_t panel;  // channels of an item, a multiple of 16
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

constexpr int64_t ROWS_IN_BLOCK = 512, FEATURES_IN_BLOCK = 64;

struct Kernels {
  void (*quantize)(const Quantize&, int64_t begin, int64_t end);            // rows
  void (*linear)(const Linear&, int64_t begin, int64_t end);                // feature blocks × row blocks
  void (*scan)(const Scan&, int64_t begin, int64_t end);                    // images × groups of LANES channels
  void (*scan_backward)(const ScanBackward&, int64_t begin, int64_t end);   // images × panels of channels
  void (*directional_scan)(const DirectionalScan&, int64_t begin, int64_t end);  // images × panels of channels
  void (*conv)(const Conv&, int64_t begin, int64_t end);                    // images × groups of LANES channels
  void (*conv_backward)(const ConvBackward&, int64_t begin, int64_t end);   // images × groups of LANES channels
};

// Instruction sets, each with all before it.
enum class Isa { portable, avx2, vnni, amx };

const char* name(Isa);
Isa best_isa();              // of this machine, as far as it was compiled in and PTQ4VM_ISA allows
Isa isa();                   // in use
void use_isa(Isa);           // at most best_isa()
const Kernels& kernels();    // of the one in use

}  // namespace ptq4vm
