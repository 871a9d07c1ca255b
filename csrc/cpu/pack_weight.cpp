// layouts.pack_weight.
#include <algorithm>

#include "linear_tiles.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

typedef int32_t i32x16 __attribute__((vector_size(64)));

// Transposes a 16×16 matrix of 32-bit lanes.
template <class V>
inline void transpose(V (&m)[16]) {
  V t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shufflevector(m[i], m[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    t[i + 1] = __builtin_shufflevector(m[i], m[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; j++) {
      m[i + j] =
          __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      m[i + j + 2] =
          __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; j++) {
      t[i + j] =
          __builtin_shufflevector(m[i + j], m[i + j + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      t[i + j + 4] =
          __builtin_shufflevector(m[i + j], m[i + j + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  }
  for (int j = 0; j < 8; j++) {
    m[j] = __builtin_shufflevector(t[j], t[j + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    m[j + 8] = __builtin_shufflevector(t[j], t[j + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}

}  // namespace

void run(const PackWeight& q, int64_t begin, int64_t end) {
  const int64_t k_tiles = divided_up(q.channels, K_TILE), padded = k_tiles * K_TILE;
  const int64_t columns = q.nibbles ? (q.channels + 1) / 2 : q.channels;
  std::vector<i32x16> vectors(TILE * k_tiles);
  auto* rows = reinterpret_cast<int8_t*>(vectors.data());
  for (int64_t group = begin; group < end; group++) {
    for (int64_t i = 0; i < TILE; i++) {
      const int64_t n = group * TILE + i;
      int8_t* row = rows + i * padded;
      if (n >= q.features) {
        std::fill_n(row, q.channels, int8_t{0});  // without channels there is no row
        continue;
      }
      const auto* from = static_cast<const int8_t*>(q.weight) + n * columns;
      if (q.nibbles) {
        for (int64_t d = 0; d < q.channels; d++) {
          const int code = from[d / 2] >> (d % 2 * 4) & 15;
          row[d] = static_cast<int8_t>((code ^ 8) - 8);
        }
      } else {
        std::copy_n(from, q.channels, row);
      }
      int32_t sum = 0;
      for (int64_t d = 0; d < q.channels; d++) sum += row[d];
      q.sum[n] = sum;
    }
    for (int64_t k = 0; k < k_tiles; k++) {
      i32x16 tile[TILE];
      for (int64_t i = 0; i < TILE; i++) tile[i] = vectors[i * k_tiles + k];
      transpose(tile);
      std::memcpy(q.tiles + (group * k_tiles + k) * TILE_CODES, tile, sizeof(tile));
    }
  }
}

}  // namespace ptq4vm::PTQ4VM_SET
