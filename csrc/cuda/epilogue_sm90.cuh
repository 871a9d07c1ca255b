// LinearEpilogue as CUTLASS 3.x calls it: by threads that hold the accumulators of wgmma.
#pragma once

#include "epilogue.cuh"

#include <cute/tensor.hpp>

namespace ptq4vm::cuda {

// Lane q of four neighbours has numbers 2q and 2q + 1 of every eight of 32 columns. It gets those of the q-th eight.
__device__ inline void exchange(int (&acc)[4][2]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i / 2 & bit) continue;
      int &low = acc[i / 2][i % 2], &high = acc[i / 2 + bit][i % 2];
      const int theirs = __shfl_xor_sync(ALL_LANES, upper ? low : high, bit);
      low = upper ? theirs : low;
      high = upper ? high : theirs;
    }
  }
}

template <bool CODES>
struct LinearEpilogueSm90 {
  using Arguments = LinearEpilogue<CODES>;
  using Params = LinearEpilogue<CODES>;
  struct SharedStorage {};

  // CUTLASS asks for the types of a matrix C, which we have not, and of D.
  using ElementC = void;
  using ElementD = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;

  template <class Problem>
  static Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }

  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }

  const Params& epilogue;

  __device__ explicit LinearEpilogueSm90(const Params& params) : epilogue(params) {}

  // `acc` is ((pair, row 0 or 8 of 16, eight columns), 64 rows, 1), as wgmma leaves it.
  template <class Problem, class Tile, class At, class Acc, class Mma, class Rest>
  __device__ void operator()(const Problem&, const Tile& tile, const At& at, const Acc& acc, const Mma& mma,
                             const Rest&, int thread, char*) const {
    using namespace cute;
    constexpr int EIGHTS = size<0, 2>(typename Acc::layout_type{}), PARTS = size<1>(typename Acc::layout_type{});
    static_assert(size<0, 0>(typename Acc::layout_type{}) == 2 && size<0, 1>(typename Acc::layout_type{}) == 2 &&
                      size<2>(typename Acc::layout_type{}) == 1 && EIGHTS % 4 == 0,
                  "pairs of columns, eight rows apart, over the whole width of the tile");
    const auto place = mma.get_slice(thread).partition_C(make_identity_tensor(take<0, 2>(tile)));
    const int first_row = get<0>(at) * get<0>(tile), direction = get<3>(at);
    const int first_column = get<1>(at) * get<1>(tile) + thread % 4 * WIDTH;
    const auto row_of = [&](int part, int half) {
      return first_row + static_cast<int>(get<0>(place(make_coord(0, half, 0), part, 0)));
    };
    LinearRow rows[PARTS][2] = {};
#pragma unroll
    for (int i = 0; i < PARTS * 2; i++) {
      const int row = row_of(i / 2, i % 2);
      if (row < epilogue.p.rows) rows[i / 2][i % 2] = epilogue.row(direction, row);
    }
    LinearColumns next;
    if (!CODES) next = epilogue.columns(direction, first_column);
#pragma unroll
    for (int eight = 0; eight < EIGHTS; eight += 4) {
      const int column = first_column + eight * WIDTH;
      const LinearColumns columns = CODES ? epilogue.columns(direction, column) : next;
      if (!CODES && eight + 4 < EIGHTS)
        next = epilogue.columns(direction, column + 4 * WIDTH);  // on its way while others store
#pragma unroll
      for (int i = 0; i < PARTS * 2; i++) {
        int values[4][2];
#pragma unroll
        for (int j = 0; j < 8; j++) values[j / 2][j % 2] = acc(make_coord(j % 2, i % 2, eight + j / 2), i / 2, 0);
        exchange(values);
        const int row = row_of(i / 2, i % 2);
        if (row < epilogue.p.rows && column < epilogue.p.features) {
          epilogue.store(direction, row, column, rows[i / 2][i % 2], columns, values[0]);
        }
      }
    }
  }
};

}  // namespace ptq4vm::cuda
