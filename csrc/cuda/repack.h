// CodeMatrix in the rows that the linears read. A model that was fused on its GPU has weights in that layout already.
#pragma once

#include "launch.h"

namespace ptq4vm::cuda {

enum class Layout {
  bytes,    // rows of int8
  nibbles,  // rows of two 4-bit codes a byte, low one first
  tiles,    // layouts.pack_weight's, of int8
  nibble_tiles,
};

// (directions, rows, channels) in any layout; rows are `columns` bytes apart where there are no tiles.
struct CodeMatrix {
  const void* data;
  Layout layout;
  int64_t directions, rows, channels, columns;
};

// Rows of `padded` codes, zeros behind the channels: bytes, of which there is a multiple of 16, or nibbles, a multiple
// of 32. `to` starts at a multiple of 16 bytes.
void repack(const CodeMatrix&, void* to, bool nibbles, int64_t padded, Stream);

// (directions, rows): the sum of each row's codes.
void sum_codes(const CodeMatrix&, int32_t* to, Stream);

}  // namespace ptq4vm::cuda
