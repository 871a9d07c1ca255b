// The arguments of operators, the same for all devices; linears have their own, since weights are packed for each.
// Pointers are to contiguous memory unless strides say more; the bindings that fill these in have checked shapes and
// types. operators.def lists the structs.
#pragma once

#include <cstdint>

#include "layout.h"

namespace ptq4vm {

enum class Float { f32, bf16, f16 };  // f16 on CUDA only

constexpr int64_t MAX_HARTLEY = 15;  // LARGEST_HARTLEY of ptq4vm/ops/rotation.py

// The qparams of an operator's codes: row r of a set has the ones at r % scales.
struct QParams {
  const float* inv_scale;
  const int32_t* zero_point;
  const float* inv_smooth;  // (D,) or null
  int64_t scales;
  int low, high;
};

// A tensor (B, L, channels) that may be a part of a larger one: its channels are contiguous.
struct Rows {
  const void* data = nullptr;
  Float type = Float::f32;
  int64_t image = 0, row = 0;  // elements from one to the next
};

// ops.quantize: x (rows, D) → codes (rows, D).
struct Quantize {
  const void* x;
  Float x_type;
  QParams qparams;
  int8_t* codes;
  int64_t rows, channels;
};

// ops.gate_quantize: codes (B, L, E) of the sum over K terms of x · gate, for x (K, B, L, E) and gate (K, B, L or 1, E).
struct GateQuantize {
  Rows x, gate;               // of the first term; gate.row is 0 where the tokens of an image share one
  int64_t x_term, gate_term;  // elements from one term to the next
  bool silu;                  // of gate first
  QParams qparams;            // of every token, or one
  int8_t* codes;
  int64_t terms, batch, tokens, channels;
};

// ops.choose_qparams: x (rows, D) → scale, zero_point (rows,).
struct ChooseQParams {
  const void* x;
  Float x_type;
  const float* inv_smooth;  // (D,) or null
  float* scale;
  int32_t* zero_point;
  int64_t rows, channels;
  int low, high;
};

// ops.dequantize: codes (rows, D) → y (rows, D), with scales as in QParams.
struct Dequantize {
  const int8_t* x;
  const float* scale;
  const int32_t* zero_point;
  float* y;
  int64_t rows, channels, scales;
};

// The rotation of a row: Hadamard's transform of every `order` channels, then Hartley's over those runs.
struct Rotation {
  const float* matrix;  // (channels / order, channels / order), Hartley's, or null
  int64_t channels, order;
  float factor;  // 1 / √order
};

// ops.rotate: x, y (rows, D).
struct Rotate {
  const void* x;
  void* y;
  Float type;
  Rotation rotation;
  int64_t rows;
};

// ops.rotate_quantize: x, codes (rows, D).
struct RotateQuantize {
  const void* x;
  Float x_type;
  bool gelu;  // of x first
  Rotation rotation;
  int8_t* codes;
  QParams qparams;
  int64_t rows;
};

// ops.norm_quantize: x, residual, total, codes (rows, D); weight, bias (D,).
struct NormQuantize {
  const void* x;
  Float x_type;
  const float *residual, *weight, *bias;  // or null
  float* total;                           // null without a residual
  int8_t* codes;
  QParams qparams;
  int64_t rows, channels;
  float eps;
  bool rms;
  const Rotation* rotation;  // of the normed values, or null
};

// ops.selective_scan: u, delta, z (B, L, E); B, C (B, L, S); contiguous A (E, S); D, delta_bias (E,); y (B, L,
// E).
struct Scan {
  Rows u, delta, B, C, z;           // z may have no data
  const float *A, *D, *delta_bias;  // the last two may be null
  void* y;
  Float y_type;
  int64_t batch, tokens, channels, states;
  bool softplus;
};

// ops.selective_scan_quantized. Scales are float32 (scales,): token t has the ones at t % scales.
struct QuantizedScan {
  Scan scan;
  const float *state_scale, *state_inv_scale;
  int64_t scales;
  int low, high;
};

// The adjoint of Scan. Gradients of what is shared between images are written for every image, those of what is shared
// between channels for every PANEL of channels, and summed by the caller: A (batch, E, S), D and delta_bias (batch, E),
// B and C (panels, batch, L, S).
struct ScanBackward {
  Scan forward;  // y unused
  const float* grad;
  float *u, *delta, *A, *B, *C;
  float *D, *z, *delta_bias;  // or null
};

// ops.directional_scan, and ops.directional_scan_quantize where there are codes instead of y. Layouts as there;
// what is not of type Rows is contiguous.
struct DirectionalScan {
  Rows u, z;            // z may have no data
  int64_t u_direction;  // elements from one direction's u to the next one's; 0 where they share it
  const float* projected;
  QParams dt_qparams;     // K sets, with inv_smooth (K, R)
  const float* dt_scale;  // (K, dt_qparams.scales)
  const void* dt_weight;
  bool packed;  // two 4-bit codes a byte
  const int32_t* dt_weight_sum;
  const float *dt_weight_scale, *dt_bias, *A, *D;  // D may be null
  const int32_t* order;                            // of every direction, `length` tokens or -1
  int64_t directions, batch, tokens, length, channels, rank, states;
  float factor;
  bool merge;
  void* y = nullptr;
  Float y_type = Float::f32;
  int8_t* codes = nullptr;
  QParams qparams = {};
  int64_t panel = 0;      // on the CPU: channels of an item, a multiple of LANES
  float* sums = nullptr;  // on CUDA: memory for as many as directional_scan_sums says
};

// ops.conv1d_quantize, and ops.causal_conv1d as its only direction, in order and without codes. x is (B, L, E);
// y, of x's type, and codes are (K, B, L, E); weight (K, E, taps). There are K sets of qparams.
struct Conv {
  Rows x;
  const float *weight, *bias;  // bias (K, E) or null
  const int32_t* order;        // (K, L), or null: 0, 1, 2, …
  void* y;
  int8_t* codes;  // or null
  QParams qparams;
  int64_t directions, batch, tokens, channels, taps;
  bool silu;
};

// The adjoint of ops.causal_conv1d for contiguous float32; gradients of weight (batch, E, taps) and bias
// (batch, E) are written for every image.
struct ConvBackward {
  Conv forward;  // y unused
  const float* grad;
  float *x, *weight, *bias;  // bias or null
};

// ops.conv2d_quantize: x and y (B, H · W, E), codes (K, B, H · W, E); weight (E, rows, columns).
struct Conv2d {
  Rows x;
  const float *weight, *bias;  // bias (E,) or null
  void* y;
  int8_t* codes;
  QParams qparams;
  int64_t directions, batch, height, width, channels, rows, columns;
};

// ops.fake_quantize: x, y (rows, D); qparams of a row as above. Without zero points codes are symmetric and x is
// divided by the scale, as weights are; with them it is multiplied by its reciprocal.
struct FakeQuantize {
  const float *x, *smooth;  // smooth (D,) or null
  const float* scale;
  const float* zero_point;  // or null
  float* y;
  int64_t rows, channels, scales;
  int low, high;
};

constexpr int64_t ROWS_IN_SUM = 32;

// The gradients of FakeQuantize, each null where nobody asks. Those of scale and zero point are written for every row,
// the smoothing's (D,) for every block of ROWS_IN_SUM rows, and the caller sums them.
struct FakeQuantizeBackward {
  FakeQuantize forward;  // y unused
  const float* grad;
  float *x, *scale, *zero_point, *smooth;
};

}  // namespace ptq4vm
