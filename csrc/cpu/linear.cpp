// ops.linear_packed and what is built on it: the accumulators are exact, and every output is rounded as the reference
// rounds it. Compiled without contraction.
//
// The work is cut into blocks of rows by blocks of 64 output channels. Within one, one to four groups of 16 channels
// pass over all rows; the sums of a few rows go through a small buffer to be rescaled and stored.
#include "linear_blocks.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

thread_local Scratch code_memory;

#if defined(__AVX512VNNI__)
constexpr int ROWS_AT_ONCE = 6, GROUPS_AT_ONCE = 4;  // as many sums as there are registers for
inline i32xw dot(i32xw sum, i32xw x, i32xw w) {
  return (i32xw)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
}
#else
constexpr int ROWS_AT_ONCE = WIDTH == 8 ? 6 : 2, GROUPS_AT_ONCE = 1;
inline i32xw dot(i32xw sum, i32xw x, i32xw w) { return add_products(sum, w, x); }
#endif

// Sums of ROWS rows by GROUPS groups of 16 output channels, `group` codes apart.
template <int ROWS, int GROUPS>
inline void multiply(int32_t* acc, const int32_t* start, const Code* x, int64_t stride, const Code* w, int64_t group,
                     int64_t padded) {
  constexpr int N = GROUPS * PARTS;
  i32xw sums[ROWS][N];
  for (int r = 0; r < ROWS; r++) {
    for (int i = 0; i < N; i++) sums[r][i] = load_as<i32xw>(start + i * WIDTH);
  }
  for (int64_t d = 0; d < padded; d += PER_LANE) {
    i32xw weights[N];
    for (int i = 0; i < N; i++) {
      weights[i] = load_as<i32xw>(w + i / PARTS * group + d * TILE + i % PARTS * (VECTOR / PARTS));
    }
    for (int r = 0; r < ROWS; r++) {
      const i32xw codes = splat(load_as<int32_t>(x + r * stride + d));
      for (int i = 0; i < N; i++) sums[r][i] = dot(sums[r][i], codes, weights[i]);
    }
  }
  std::memcpy(acc, sums, sizeof(sums));
}

// Rows from r on, ROWS at once, fewer at the end.
template <int GROUPS, int ROWS = ROWS_AT_ONCE, class Out>
void multiply_rows(const Out& out, const LinearRowQParams* rows, const FeatureParameters& f, const Code* x,
                   const Code* w, int64_t padded, int64_t c, int64_t count, int64_t r = 0) {
  for (; r + ROWS <= count; r += ROWS) {
    alignas(64) int32_t acc[ROWS * GROUPS * TILE];
    multiply<ROWS, GROUPS>(acc, f.start + c, x + r * padded, padded, w + c * padded, TILE * padded, padded);
    Epilogue<GROUPS, Out>(moved(out, r, 0), rows + r, f, c, acc)(0, ROWS);
  }
  if constexpr (ROWS > 1) multiply_rows<GROUPS, ROWS / 2>(out, rows, f, x, w, padded, c, count, r);
}

// Output channels from c on, GROUPS groups at once, fewer at the end.
template <int GROUPS = GROUPS_AT_ONCE, class Out>
void multiply_all(const Out& out, const LinearRowQParams* rows, const FeatureParameters& f, const Code* x,
                  const Code* w, int64_t padded, int64_t count, int64_t c = 0) {
  for (; c + (GROUPS - 1) * TILE < f.count; c += GROUPS * TILE) {
    multiply_rows<GROUPS>(out, rows, f, x, w, padded, c, count);
  }
  if constexpr (GROUPS > 1) multiply_all<GROUPS / 2>(out, rows, f, x, w, padded, count, c);
}

template <class Out>
void dot_blocks(const Linear& q, const Out& y, int64_t begin, int64_t end) {
  RowBlock block;
  FeatureParameters f;
  Code* x = nullptr;
  for (int64_t item = begin; item < end; item++) {
    if (item == begin || item % q.feature_blocks() == 0) {
      block.read(q, item / q.feature_blocks());
      x = code_memory.take<Code>(block.count * block.stride);
      convert_rows(x, block.x, block.count * block.stride);
    }
    const Code* w = read_features(f, q, block, item);
    multiply_all(results(y, q, block, item), block.rows, f, x, w, block.stride, block.count);
  }
}

}  // namespace

void run(const Linear& q, int64_t begin, int64_t end) {
  with_output(q, [&](const auto& y) { dot_blocks(q, y, begin, end); });
}

}  // namespace ptq4vm::PTQ4VM_SET
