// What every instruction set implements, and how one is chosen. A kernel does the part [begin, end) of its work, and
// what it gives does not depend on how the work was divided.
#pragma once

#include "../operators.h"

namespace ptq4vm {

constexpr int64_t FEATURES_IN_BLOCK = 64;

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
  int64_t first_row;      // of x, whose results are y's first

  int64_t row_blocks() const { return (rows + rows_in_block - 1) / rows_in_block; }
  int64_t feature_blocks() const { return (weight.features + FEATURES_IN_BLOCK - 1) / FEATURES_IN_BLOCK; }
  int64_t blocks() const { return directions * row_blocks() * feature_blocks(); }
};

struct Kernels {
  void (*quantize)(const Quantize&, int64_t begin, int64_t end);                 // rows
  void (*pack)(const Pack&, int64_t begin, int64_t end);                         // groups of 16 features
  void (*linear)(const Linear&, int64_t begin, int64_t end);                     // blocks()
  void (*scan)(const Scan&, int64_t begin, int64_t end);                         // images × groups of LANES channels
  void (*scan_quantized)(const QuantizedScan&, int64_t begin, int64_t end);      // images × groups of LANES channels
  void (*scan_backward)(const ScanBackward&, int64_t begin, int64_t end);        // images × panels of channels
  void (*directional_scan)(const DirectionalScan&, int64_t begin, int64_t end);  // images × panels of channels
  void (*choose_qparams)(const ChooseQparams&, int64_t begin, int64_t end);      // rows
  void (*dequantize)(const Dequantize&, int64_t begin, int64_t end);             // rows
  void (*rotate)(const Rotate&, int64_t begin, int64_t end);                     // rows
  void (*rotate_quantize)(const RotateQuantize&, int64_t begin, int64_t end);    // rows
  void (*norm_quantize)(const NormQuantize&, int64_t begin, int64_t end);        // rows
  void (*conv)(const Conv&, int64_t begin, int64_t end);      // directions × images × groups of LANES channels
  void (*conv2d)(const Conv2d&, int64_t begin, int64_t end);  // images × rows of the map
  void (*conv_backward)(const ConvBackward&, int64_t begin, int64_t end);  // images × groups of LANES channels
  void (*fake_quantize)(const FakeQuantize&, int64_t begin, int64_t end);  // rows
  void (*fake_quantize_backward)(const FakeQuantizeBackward&, int64_t begin, int64_t end);  // blocks of ROWS_IN_SUM
};

// Instruction sets, each with all before it.
enum class Isa { portable, avx2, vnni, amx };

const char* name(Isa);
Isa best_isa();            // of this machine, as far as it was compiled in and PTQ4VM_ISA allows
Isa isa();                 // in use
void use_isa(Isa);         // at most best_isa()
const Kernels& kernels();  // of the one in use

}  // namespace ptq4vm
