// int8 by int8 on compute capability 9.0, compiled for sm_90a only: no other GPU has these instructions.
#ifndef NDEBUG
#define NDEBUG  // CUTLASS's assertions are function calls, around which wgmma waits
#endif

#include <algorithm>

#include "gemm_sm90.cuh"
#include "tiles.h"

namespace ptq4vm::cuda {
namespace {

template <bool CODES>
void launch_tile(const LinearProblem& p, Stream stream) {
  switch (choose_tile(TILES_SM90, p.directions, p.rows, p.features)) {
    case Tile::rows128_features128: return GemmSm90<128, 128, CODES>::launch(p, stream);
    default: return GemmSm90<64, 128, CODES>::launch(p, stream);
  }
}

}  // namespace

bool linear_s8_sm90(const LinearProblem& p, Stream stream) {
  // The tensor memory accelerator has no empty tensors, and strides below 2^40.
  const int64_t most = std::max(p.rows, p.features) * p.channels;
  if (!fits_a_launch(p) || p.channels == 0 || most >= int64_t{1} << 40) return false;
  if (p.rows == 0 || p.features == 0 || p.directions == 0) return true;
  p.codes ? launch_tile<true>(p, stream) : launch_tile<false>(p, stream);
  return true;
}

}  // namespace ptq4vm::cuda
