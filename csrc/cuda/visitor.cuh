// LinearEpilogue as CUTLASS 2.x calls it: by threads that hold runs of eight accumulators of a tile, at the coordinates
// that its PredicatedTileIterator would have.
#pragma once

#include <cutlass/array.h>
#include <cutlass/gemm_coord.h>

#include "epilogue.cuh"

namespace ptq4vm::cuda {

template <class ThreadMap, class TileShape, class Epilogue>
struct LinearVisitor {
  static_assert(ThreadMap::kElementsPerAccess == WIDTH && ThreadMap::Iterations::kCount == 1 &&
                    ThreadMap::Count::kGroup == 1 && ThreadMap::Count::kCluster == 1,
                "a step is one run of eight for a thread, each below the one before");

  using Arguments = Epilogue;
  using Params = Epilogue;
  struct SharedStorage {};

  template <class Problem>
  static Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }

  const Epilogue& epilogue;

  CUTLASS_DEVICE LinearVisitor(const Params& params, const SharedStorage&) : epilogue(params) {}

  struct Callbacks {
    const Epilogue& epilogue;
    int64_t direction;
    int first_row, column;
    LinearColumns columns;
    LinearRow row;

    CUTLASS_DEVICE int row_of(int step) const { return first_row + ThreadMap::Shape::kRow * step; }

    CUTLASS_DEVICE void begin_epilogue() { columns = epilogue.columns(direction, column); }

    CUTLASS_DEVICE void begin_step(int step) {  // before its barriers, which hide the way to memory
      if (row_of(step) < epilogue.p.rows) row = epilogue.row(direction, row_of(step));
    }

    CUTLASS_DEVICE void visit(int step, int, int, int, const cutlass::Array<int, WIDTH>& acc) {
      if (row_of(step) < epilogue.p.rows && column < epilogue.p.features) {
        epilogue.store(direction, row_of(step), column, row, columns, acc.data());
      }
    }

    CUTLASS_DEVICE void begin_row(int) {}
    CUTLASS_DEVICE void end_row(int) {}
    CUTLASS_DEVICE void end_step(int) {}
    CUTLASS_DEVICE void end_epilogue() {}
  };

  template <class Problem>
  CUTLASS_DEVICE Callbacks get_callbacks(cutlass::gemm::GemmCoord tile, int thread, const Problem&) {
    const cutlass::MatrixCoord first = ThreadMap::initial_offset(thread);
    const int row = tile.m() * TileShape::kM + first.row(), column = tile.n() * TileShape::kN + first.column();
    return {epilogue, tile.k(), row, column, {}, {}};
  }
};

}  // namespace ptq4vm::cuda
