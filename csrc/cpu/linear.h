// A few rows times some output channels of a packed weight, for kernels that consume the result at once.
#pragma once

#include "kernels.h"

namespace ptq4vm {
namespace PTQ4VM_SET {

constexpr int64_t FEW_ROWS = 32;

// reference.linear of at most FEW_ROWS rows.
struct LinearRows {
  PackedWeight weight;
  const int8_t* x;  // codes, zeros up to a multiple of 64 channels; memory for a multiple of 16 rows
  int64_t x_stride;
  const float* x_scale;       // of each row
  const int32_t* zero_point;  // of each row
  float* y;                   // row r, channel c of the first group: y[r * y_stride + c]
  int64_t y_stride;
  int64_t rows;
};

// Groups [begin, end) of 16 output channels; whole groups are written, zeros where there are no channels.
void linear_rows(const LinearRows&, int64_t begin, int64_t end);

// The same with tile registers, between begin_tiles() and end_tiles().
void begin_tiles();
void end_tiles();
void linear_rows_amx(const LinearRows&, int64_t begin, int64_t end);

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
