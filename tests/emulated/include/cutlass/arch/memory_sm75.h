// Stands in for CUTLASS's header of this name on the CPU: ldmatrix, by all 32 lanes of a warp.
#pragma once

#include <cuda_runtime.h>

#include "cutlass/array.h"
#include "cutlass/layout/matrix.h"

namespace cutlass {
namespace arch {

// Lanes 8j to 8j + 7 give the addresses of the rows of matrix j: 8 rows of 16 bytes. Every lane gets 4 bytes of each.
template <typename Layout, int MATRICES>
inline void ldsm(Array<unsigned, MATRICES>& to, const void* row) {
  static_assert(std::is_same<Layout, layout::RowMajor>::value, "no matrix is transposed");
  const int lane = ptq4vm::emulator::lane();
  const void* rows[MATRICES];
  for (int j = 0; j < MATRICES; j++) rows[j] = ptq4vm::emulator::shuffle(~0u, row, 8 * j + lane / 4);
  for (int j = 0; j < MATRICES; j++) std::memcpy(&to[j], static_cast<const char*>(rows[j]) + 4 * (lane % 4), 4);
}

template <typename T>
inline void shared_load(T& to, const void* from) {
  to = *static_cast<const T*>(from);
}

inline unsigned cutlass_get_smem_pointer(const void*) { ptq4vm::emulator::fail("shared memory has no short address"); }

}  // namespace arch
}  // namespace cutlass
