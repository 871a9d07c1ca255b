// reference.linear: the accumulators are exact, and every output is rounded as the reference rounds it.
//
// The work is cut into blocks of rows by blocks of 64 output channels. A block's weight is rearranged once, 16 channels
// to a vector, and stays in the first caches while all rows of the block pass; the codes are read as they lie. The sums
// of the weight's rows, for the zero points, come with the rearrangement. Compiled without contraction.
#include "kernels.h"
#include "vec.h"

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

constexpr int64_t TILE = 16;  // rows, or output channels
constexpr int64_t STEP = 64;  // channels in that a tile holds
constexpr int64_t WIDTH = FEATURES_IN_BLOCK;
#if defined(__AVX512VNNI__)
constexpr int ROWS_AT_ONCE = 6, GROUPS_AT_ONCE = 4;  // as many sums as there are registers for
#elif defined(__AVX2__)
constexpr int ROWS_AT_ONCE = 4, GROUPS_AT_ONCE = 1;
#else
constexpr int ROWS_AT_ONCE = 2, GROUPS_AT_ONCE = 1;
#endif

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

struct Scratch {
  std::vector<uint8_t> memory;
  template <class T>
  T* take(size_t count) {  // 64-byte aligned; what it held before is gone
    if (memory.size() < count * sizeof(T) + 64) memory.resize(count * sizeof(T) + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  }
};

thread_local Scratch weight_memory, row_memory, code_memory;

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
      m[i + j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      m[i + j + 2] =
          __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; j++) {
      t[i + j] = __builtin_shufflevector(m[i + j], m[i + j + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      t[i + j + 4] =
          __builtin_shufflevector(m[i + j], m[i + j + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  }
  for (int j = 0; j < 8; j++) {
    m[j] = __builtin_shufflevector(t[j], t[j + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    m[j + 8] = __builtin_shufflevector(t[j], t[j + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}

// --- the weight ---

#ifdef __AVX512VNNI__
using Code = int8_t;  // four channels in a lane
#else
using Code = int16_t;  // two channels in a lane
#endif
constexpr int64_t PER_LANE = 4 / static_cast<int64_t>(sizeof(Code));
constexpr int64_t VECTOR = LANES * PER_LANE;

// 64 output channels from n on, zeros where there are none: [4][padded / PER_LANE][16 channels][PER_LANE].
struct Weights {
  Code* codes = nullptr;
  int64_t n = -1, padded = 0, group = 0;  // group: codes of 16 channels
  alignas(64) int32_t sums[WIDTH];
  alignas(64) float scales[WIDTH];
  alignas(64) float bias[WIDTH];
};

// The sum of the codes of each lane, added to the sums so far.
inline i32x16 add_codes(i32x16 sums, i32x16 lanes) {
#ifdef __AVX512VNNI__
  return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi8(1), (__m512i)lanes);
#else
  return sums + ((lanes << 16) >> 16) + (lanes >> 16);
#endif
}

typedef int8_t i8x32 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

// Two codes a byte, low nibble first → int8.
void unpack(int8_t* to, const uint8_t* from, int64_t channels) {
  int64_t d = 0;
  for (; d + 32 <= channels; d += 32) {
    const u16x16 wide = __builtin_convertvector(load_as<u8x16>(from + d / 2), u16x16);
    const u16x16 nibbles = (wide & 15) | ((wide << 4) & 0x0f00);
    const i8x32 codes = ((i8x32)nibbles ^ 8) - 8;
    std::memcpy(to + d, &codes, sizeof(codes));
  }
  for (; d < channels; d++) {
    const int code = (from[d / 2] >> (d % 2 * 4)) & 15;
    to[d] = static_cast<int8_t>((code ^ 8) - 8);
  }
}

void read_weights(Weights& to, const Linear& q, int64_t n) {
  to.n = n;
  to.padded = round_up(std::max<int64_t>(q.channels, 1), STEP);
  to.group = to.padded * TILE;
  to.codes = weight_memory.take<Code>(WIDTH * to.padded);
  auto* rows = row_memory.take<int8_t>(TILE * to.padded);
  for (int64_t first = 0; first < WIDTH; first += TILE) {
    const int8_t* row[TILE];
    for (int64_t i = 0; i < TILE; i++) {
      const int64_t feature = n + first + i;
      int8_t* copy = rows + i * to.padded;
      const bool there = feature < q.features;
      row[i] = copy;
      if (there && q.packed) {
        unpack(copy, static_cast<const uint8_t*>(q.weight) + feature * ((q.channels + 1) / 2), q.channels);
      } else if (there && to.padded == q.channels) {
        row[i] = static_cast<const int8_t*>(q.weight) + feature * q.channels;
        continue;
      } else if (there) {
        std::memcpy(copy, static_cast<const int8_t*>(q.weight) + feature * q.channels, q.channels);
      }
      std::memset(copy + (there ? q.channels : 0), 0, to.padded - (there ? q.channels : 0));
    }
    i32x16 sum = {};
    Code* group = to.codes + first * to.padded;
    for (int64_t d = 0; d < to.padded; d += VECTOR) {
      i32x16 block[TILE];
      for (int64_t i = 0; i < TILE; i++) {
#ifdef __AVX512VNNI__
        block[i] = load_as<i32x16>(row[i] + d);
#else
        typedef int16_t i16x32 __attribute__((vector_size(64)));
        block[i] = (i32x16)__builtin_convertvector(load_as<i8x32>(row[i] + d), i16x32);
#endif
      }
      transpose(block);
      for (const i32x16& lanes : block) sum = add_codes(sum, lanes);
      std::memcpy(group + d * TILE, block, sizeof(block));
    }
    std::memcpy(to.sums + first, &sum, sizeof(sum));
  }
  for (int64_t i = 0; i < WIDTH; i++) {
    const int64_t feature = std::min(n + i, q.features - 1);
    to.scales[i] = q.weight_scale[feature];
    to.bias[i] = q.bias ? q.bias[feature] : 0.0f;
  }
}

// --- the result ---

// Rows of a block: their codes, `stride` apart, their qparams, and where their results go.
template <class T>
struct Rows {
  const Code* x;
  int64_t stride, count;
  T* y;
  float scales[ROWS_IN_BLOCK];
  int32_t zero_points[ROWS_IN_BLOCK];
};

// 16 output channels of one row: zero point, rescale, bias.
template <class T>
inline void finish(const Linear& q, const Rows<T>& rows, const Weights& w, int64_t r, int64_t half, i32x16 acc,
                   int offset) {
  acc = acc - load_as<i32x16>(w.sums + half) * (rows.zero_points[r] + offset);
  f32x16 value = (__builtin_convertvector(acc, f32x16) * splat(rows.scales[r])) * load(w.scales + half);
  if (q.bias) value = value + load(w.bias + half);
  store_some(rows.y + r * q.features + w.n + half, value, q.features - w.n - half);
}

// --- dot products without tiles ---

// 16 lanes of sums are PARTS registers.
#if defined(__AVX512VNNI__)
constexpr int OFFSET = 128;  // dpbusd takes unsigned times signed: the rows' codes are 128 more than they are
using Register = __m512i;
inline Register dot(Register sum, int32_t x, Register w) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(x), w); }
#elif defined(__AVX2__)
constexpr int OFFSET = 0;
using Register = __m256i;
inline Register dot(Register sum, int32_t x, Register w) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w, _mm256_set1_epi32(x)));
}
#elif defined(__SSE2__)
constexpr int OFFSET = 0;
using Register = __m128i;
inline Register dot(Register sum, int32_t x, Register w) {
  return _mm_add_epi32(sum, _mm_madd_epi16(w, _mm_set1_epi32(x)));
}
#else
constexpr int OFFSET = 0;
using Register = i32x16;
inline Register dot(Register sum, int32_t x, Register w) {
  return sum + ((w << 16) >> 16) * ((x << 16) >> 16) + (w >> 16) * (x >> 16);
}
#endif
constexpr int PARTS = sizeof(i32x16) / sizeof(Register);

// The codes of one row that one lane multiplies.
inline int32_t lane(const Code* x) {
  uint32_t codes;
  std::memcpy(&codes, x, sizeof(codes));
  return static_cast<int32_t>(OFFSET ? codes ^ 0x80808080u : codes);
}

// ROWS rows from r on by 64 output channels.
template <int ROWS, class T>
void multiply(const Linear& q, const Rows<T>& rows, const Weights& w, int64_t r0) {
  const Code* x = rows.x + r0 * rows.stride;
  constexpr int GROUPS = WIDTH / TILE;
  for (int64_t half = 0; half < GROUPS; half += GROUPS_AT_ONCE) {
    Register sums[ROWS][GROUPS_AT_ONCE][PARTS] = {};
    const Code* codes = w.codes + half * w.group;
    for (int64_t d = 0; d < w.padded; d += PER_LANE) {
      Register weights[GROUPS_AT_ONCE][PARTS];
      for (int g = 0; g < GROUPS_AT_ONCE; g++) {
        for (int p = 0; p < PARTS; p++) {
          weights[g][p] = load_as<Register>(codes + g * w.group + d * TILE + p * (VECTOR / PARTS));
        }
      }
      for (int r = 0; r < ROWS; r++) {
        const int32_t x_codes = lane(x + r * rows.stride + d);
        for (int g = 0; g < GROUPS_AT_ONCE; g++) {
          for (int p = 0; p < PARTS; p++) sums[r][g][p] = dot(sums[r][g][p], x_codes, weights[g][p]);
        }
      }
    }
    for (int r = 0; r < ROWS; r++) {
      for (int g = 0; g < GROUPS_AT_ONCE && w.n + (half + g) * TILE < q.features; g++) {
        alignas(64) Register all[PARTS];
        for (int p = 0; p < PARTS; p++) all[p] = sums[r][g][p];
        const auto acc = load_as<i32x16>(all);
        finish(q, rows, w, r0 + r, (half + g) * TILE, acc, OFFSET);
      }
    }
  }
}

struct DotProducts {
  template <class T>
  void operator()(const Linear& q, const Rows<T>& rows, const Weights& w, int64_t first = 0) const {
    int64_t r = first;
    for (; r + ROWS_AT_ONCE <= rows.count; r += ROWS_AT_ONCE) multiply<ROWS_AT_ONCE>(q, rows, w, r);
    for (; r < rows.count; r++) multiply<1>(q, rows, w, r);
  }
};

// --- the work ---

// The codes where they are, or padded with zeros and as wide as the dot products want them.
template <class T>
void read_rows(Rows<T>& rows, const Linear& q, int64_t row, int64_t padded) {
  const int8_t* x = q.x + row * q.channels;
  rows.stride = padded;
  if constexpr (sizeof(Code) == sizeof(int8_t)) {
    if (padded == q.channels) {
      rows.x = x;
      return;
    }
  }
  auto* copy = code_memory.take<Code>(rows.count * padded);
  for (int64_t r = 0; r < rows.count; r++) {
    Code* to = copy + r * padded;
    std::copy(x + r * q.channels, x + (r + 1) * q.channels, to);
    std::fill(to + q.channels, to + padded, Code{0});
  }
  rows.x = copy;
}

// Items [begin, end) of the blocks: rows pass fastest, so that a weight that is rearranged serves several blocks.
template <class T, class Products>
void blocks(const Linear& q, T* y, int64_t begin, int64_t end, const Products& products) {
  const int64_t row_blocks = (q.rows + ROWS_IN_BLOCK - 1) / ROWS_IN_BLOCK;
  Weights w;
  Rows<T> rows;
  for (int64_t item = begin; item < end; item++) {
    const int64_t n = item / row_blocks * WIDTH, row = item % row_blocks * ROWS_IN_BLOCK;
    if (w.n != n) read_weights(w, q, n);
    rows.count = std::min(ROWS_IN_BLOCK, q.rows - row);
    rows.y = y + row * q.features;
    for (int64_t r = 0, i = row % q.scales; r < rows.count; r++, i = i + 1 == q.scales ? 0 : i + 1) {
      rows.scales[r] = q.x_scale[i];
      rows.zero_points[r] = q.zero_point[i];
    }
    read_rows(rows, q, row, w.padded);
    products(q, rows, w);
  }
}

template <class Products>
void run(const Linear& q, int64_t begin, int64_t end, const Products& products) {
  if (q.y_type == Float::f32) {
    blocks(q, static_cast<float*>(q.y), begin, end, products);
  } else {
    blocks(q, static_cast<bfloat16*>(q.y), begin, end, products);
  }
}

}  // namespace

void linear(const Linear& q, int64_t begin, int64_t end) { run(q, begin, end, DotProducts{}); }

#ifdef __AVX512VNNI__

namespace {

#define PTQ4VM_TILES __attribute__((target("amx-tile,amx-int8")))

// Two tiles of rows by two of output channels: four tile registers of sums, two of each operand.
struct TileProducts {
  template <class T>
  PTQ4VM_TILES void operator()(const Linear& q, const Rows<T>& rows, const Weights& w) const {
    alignas(64) int32_t acc[4][TILE][TILE];
    const int64_t whole = rows.count / (2 * TILE) * (2 * TILE);
    for (int64_t half = 0; half < WIDTH && w.n + half < q.features; half += 2 * TILE) {
      const int8_t* w0 = w.codes + half * w.padded;
      const int8_t* w1 = w0 + w.group;
      for (int64_t r = 0; r < whole; r += 2 * TILE) {
        const int8_t* x0 = rows.x + r * rows.stride;
        const int8_t* x1 = x0 + TILE * rows.stride;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t d = 0; d < w.padded; d += STEP) {
          _tile_loadd(6, w0 + d * TILE, STEP);
          _tile_loadd(4, x0 + d, rows.stride);
          _tile_dpbssd(0, 4, 6);
          _tile_loadd(7, w1 + d * TILE, STEP);
          _tile_dpbssd(1, 4, 7);
          _tile_loadd(5, x1 + d, rows.stride);
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, acc[0], STEP);
        _tile_stored(1, acc[1], STEP);
        _tile_stored(2, acc[2], STEP);
        _tile_stored(3, acc[3], STEP);
        for (int64_t t = 0; t < 2 * TILE; t++) {
          for (int64_t g = 0; g < 2 && w.n + half + g * TILE < q.features; g++) {
            finish(q, rows, w, r + t, half + g * TILE, load_as<i32x16>(acc[t / TILE * 2 + g][t % TILE]), 0);
          }
        }
      }
    }
    DotProducts{}(q, rows, w, whole);
  }
};

// All eight tiles are 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace

PTQ4VM_TILES void linear_amx(const Linear& q, int64_t begin, int64_t end) {
  const TileConfig config;
  _tile_loadconfig(&config);
  run(q, begin, end, TileProducts{});
  _tile_release();
}

#endif

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
