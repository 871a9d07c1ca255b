// LinearEpilogue as CUTLASS 2.x calls it: by threads that hold runs of eight accumulators of a tile, at the coordinates
// that its PredicatedTileIterator would have.
#pragma once

#include <cutlass/array.h>
#include <cutlass/gemm_coord.h>

#include "epilogue.cuh"

namespace ptq4vm {
namespace cuda {

template <class ThreadMap, class TileShape, class Epilogue>
struct LinearVisitor {
  using Count = typename ThreadMap::Count;
  using Shape = typename ThreadMap::Shape;
  using Iterations = typename ThreadMap::Iterations;
  static constexpr int ROWS = Iterations::kRow * Iterations::kGroup * Iterations::kCluster;  // of a thread in a step
  static_assert(ThreadMap::kElementsPerAccess == WIDTH && Iterations::kColumn == 1, "a thread keeps to its columns");
  static_assert(Count::kCluster == 1, "steps pass through rows and groups only");

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
    int row, column;
    LinearColumns columns;
    LinearRow rows[ROWS];

    CUTLASS_DEVICE int row_of(int step, int i) const {
      const int count = step % Count::kRow, group = step / Count::kRow;
      return row + Shape::kRow * (count + group * Count::kRow * Shape::kGroup) + ThreadMap::iteration_offset(i).row();
    }

    CUTLASS_DEVICE void begin_epilogue() { columns = epilogue.columns(direction, column); }

    CUTLASS_DEVICE void begin_step(int step) {  // before its barriers, which hide the way to memory
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < ROWS; i++) {
        if (row_of(step, i) < epilogue.p.rows) rows[i] = epilogue.row(direction, row_of(step, i));
      }
    }

    CUTLASS_DEVICE void visit(int step, int i, int, int, const cutlass::Array<int, WIDTH>& acc) {
      if (row_of(step, i) < epilogue.p.rows && column < epilogue.p.features) {
        epilogue.store(direction, row_of(step, i), column, rows[i], columns, acc.data());
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
    return {epilogue, tile.k(), tile.m() * TileShape::kM + first.row(), tile.n() * TileShape::kN + first.column(), {}, {}};
  }
};

}  // namespace cuda
}  // namespace ptq4vm
