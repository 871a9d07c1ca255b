// What every instruction set implements, and how one is chosen. Pointers are to contiguous memory; the glue in ops.cpp
// has checked shapes and types. A kernel does the part [begin, end) of its work, and what it gives does not depend on
// how the work was divided.
#pragma once

#include <cstdint>

namespace ptq4vm {

enum class Float { f32, bf16 };

constexpr int64_t FEATURES_IN_BLOCK = 64;

// Those of the codes that an operator gives: row r of a set has the ones at r % scales.
struct Qparams {
  const float* inv_scale;
  const int32_t* zero_point;
  const float* inv_smooth;  // (D,) or null
  int64_t scales;
  int low, high;
};

// reference.quantize: x (rows, D) → codes (rows, D).
struct Quantize {
  const void* x;
  Float x_type;
  Qparams qparams;
  int8_t* codes;
  int64_t rows, channels;
};

// reference.choose_qparams: x (rows, D) → scale, zero_point (rows,).
struct ChooseQparams {
  const void* x;
  Float x_type;
  const float* inv_smooth;  // (D,) or null
  float* scale;
  int32_t* zero_point;
  int64_t rows, channels;
  int low, high;
};

// reference.dequantize: codes (rows, D) → y (rows, D). Qparams as in Qparams.
struct Dequantize {
  const int8_t* x;
  const float* scale;
  const int32_t* zero_point;
  float* y;
  int64_t rows, channels, scales;
};

// fused.norm_quantize: x, residual, total, codes (rows, D); weight, bias (D,).
struct NormQuantize {
  const void* x;
  Float x_type;
  const float *residual, *weight, *bias;  // or null
  float* total;                           // null without a residual
  int8_t* codes;
  Qparams qparams;
  int64_t rows, channels;
  float eps;
  bool rms;
};

// fused.pack_weight: tiles [ceil(N / 16)][ceil(D / 64)][16][64] int8, or [16][32] bytes of two 4-bit codes.
struct PackedWeight {
  const void* tiles;
  bool nibbles;
  const int32_t* sum;  // (N,) of each row's codes
  const float* scale;  // (N,)
  const float* bias;   // (N,) or null
  int64_t channels, features;
};

// Packs a plain weight: int8 (N, D), or two 4-bit codes a byte (N, ceil(D / 2)).
struct Pack {
  const void* weight;
  bool nibbles;
  int8_t* tiles;
  int32_t* sum;  // (N,)
  int64_t channels, features;
};

// fused.linear_packed: x (K, rows, D), qparams (K, scales), weights and y one direction after the other. With
// gelu_codes, fused.linear_gelu_quantize: those are written, and not y.
struct Linear {
  const int8_t* x;
  const float* x_scale;
  const int32_t* zero_point;
  PackedWeight weight;
  void* y;
  Float y_type;
  bool normal;         // no result but zero is so small that float32 has it denormal
  int8_t* gelu_codes;  // or null
  Qparams gelu;
  int64_t directions, rows, scales;
  int64_t rows_in_block;  // a multiple of 32

  int64_t row_blocks() const { return (rows + rows_in_block - 1) / rows_in_block; }
  int64_t feature_blocks() const { return (weight.features + FEATURES_IN_BLOCK - 1) / FEATURES_IN_BLOCK; }
  int64_t blocks() const { return directions * row_blocks() * feature_blocks(); }
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

// fused.conv1d_quantize, and reference.causal_conv1d as its only direction, in order and without codes. x (B, L, E) has
// rows of E that lie x_row numbers apart, and images x_image apart; y, of x's type, and codes are (K, B, L, E);
// weight (K, E, taps). There are K sets of qparams.
struct Conv {
  const void* x;
  Float type;
  int64_t x_image, x_row;
  const float *weight, *bias;  // bias (K, E) or null
  const int32_t* order;        // (K, L), or null: 0, 1, 2, …
  void* y;
  int8_t* codes;  // or null
  Qparams qparams;
  int64_t directions, batch, tokens, channels, taps;
  bool silu;
};

// fused.conv2d_quantize: x (B, H · W, E) lies as in Conv; y (B, H · W, E), codes (K, B, H · W, E);
// weight (E, rows, columns).
struct Conv2d {
  const void* x;
  Float type;
  int64_t x_image, x_row;
  const float *weight, *bias;  // bias (E,) or null
  void* y;
  int8_t* codes;
  Qparams qparams;
  int64_t directions, batch, height, width, channels, rows, columns;
};

// The adjoint of reference.causal_conv1d for contiguous float32; gradients of weight (batch, E, taps) and bias
// (batch, E) are written for every image.
struct ConvBackward {
  Conv forward;  // y unused
  const float* grad;
  float *x, *weight, *bias;  // bias or null
};

struct Kernels {
  void (*quantize)(const Quantize&, int64_t begin, int64_t end);            // rows
  void (*pack)(const Pack&, int64_t begin, int64_t end);                    // groups of 16 features
  void (*linear)(const Linear&, int64_t begin, int64_t end);                // blocks()
  void (*scan)(const Scan&, int64_t begin, int64_t end);                    // images × groups of LANES channels
  void (*scan_backward)(const ScanBackward&, int64_t begin, int64_t end);   // images
  void (*choose_qparams)(const ChooseQparams&, int64_t begin, int64_t end);  // rows
  void (*dequantize)(const Dequantize&, int64_t begin, int64_t end);        // rows
  void (*norm_quantize)(const NormQuantize&, int64_t begin, int64_t end);   // rows
  void (*conv)(const Conv&, int64_t begin, int64_t end);         // directions × images × groups of LANES channels
  void (*conv2d)(const Conv2d&, int64_t begin, int64_t end);     // images × rows of the map
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
