// fused.linear_packed and what is built on it: the accumulators are exact, and every output is rounded as the reference
// rounds it. Compiled without contraction.
//
// Weights come in tiles: 64 input channels of 16 output channels, the operand of AMX and of VNNI as it lies in memory.
// The work is cut into blocks of rows by blocks of 64 output channels. Within one, two or four groups of 16 channels
// pass over all rows; the sums of a few rows go through a small buffer to be rescaled and stored.
#include "linear.h"

#include <algorithm>
#include <vector>

#include "math.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

constexpr int64_t TILE = 16;                 // rows, or output channels
constexpr int64_t STEP = 64;                 // channels in that a tile holds
constexpr int64_t CODES = TILE * STEP;       // in a tile
constexpr int64_t PARTS = LANES / WIDTH;     // registers of 16 sums

typedef int32_t i32xw __attribute__((vector_size(WIDTH * sizeof(int32_t))));
typedef int16_t i16xw __attribute__((vector_size(WIDTH * sizeof(int16_t))));
typedef int8_t i8xw __attribute__((vector_size(WIDTH)));
typedef uint16_t u16xw __attribute__((vector_size(WIDTH * sizeof(uint16_t))));

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

struct Scratch {
  std::vector<uint8_t> memory;
  template <class T>
  T* take(size_t count) {  // 64-byte aligned; what it held before is gone
    if (memory.size() < count * sizeof(T) + 64) memory.resize(count * sizeof(T) + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  }
};

thread_local Scratch weight_memory, row_memory, code_memory, qparam_memory;

// --- codes as the products want them ---

#ifdef __AVX512VNNI__
using Code = int8_t;  // four channels in a lane
#else
using Code = int16_t;  // two channels in a lane: the first and third of four, then the second and fourth
#endif
constexpr int64_t PER_LANE = 4 / static_cast<int64_t>(sizeof(Code));
constexpr int64_t VECTOR = LANES * PER_LANE;

typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));

// The codes of `tiles` tiles.
void unpack(int8_t* to, const uint8_t* from, int64_t tiles) {
  for (int64_t i = 0; i < tiles * CODES; i += STEP, from += STEP / 2) {
    const auto bytes = load_as<u8x32>(from);
    const u8x32 low = ((bytes & 15) ^ 8) - 8, high = ((bytes >> 4) ^ 8) - 8;
    std::memcpy(to + i, &low, sizeof(low));
    std::memcpy(to + i + STEP / 2, &high, sizeof(high));
  }
}

// int8 pairs → the int16 of their even places, then those of the odd ones.
inline void widen(int16_t* to, const int8_t* from, int64_t tiles) {
  for (int64_t i = 0; i < tiles * CODES; i += STEP) {
    const auto pairs = load_as<i16x32>(from + i);
    const i16x32 even = (pairs << 8) >> 8, odd = pairs >> 8;
    std::memcpy(to + i, &even, sizeof(even));
    std::memcpy(to + i + STEP / 2, &odd, sizeof(odd));
  }
}

// Groups [begin, end) of 16 output channels, where they are or in memory for (end - begin) · tiles of both kinds.
const Code* read_weight(const PackedWeight& w, int64_t begin, int64_t end, Code* codes, int8_t* unpacked) {
  const int64_t steps = (w.channels + STEP - 1) / STEP, tiles = (end - begin) * steps;
  const auto* from = static_cast<const int8_t*>(w.tiles) + begin * steps * (w.nibbles ? CODES / 2 : CODES);
  if (w.nibbles) {
    unpack(unpacked, reinterpret_cast<const uint8_t*>(from), tiles);
    from = unpacked;
  }
#ifdef __AVX512VNNI__
  return from;
#else
  widen(codes, from, tiles);
  return codes;
#endif
}

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

// Rows, `stride` apart, padded with zeros.
void copy_rows(int8_t* to, int64_t padded, const int8_t* x, int64_t stride, int64_t rows, int64_t channels) {
  for (int64_t r = 0; r < rows; r++, to += padded) {
    std::memcpy(to, x + r * stride, channels);
    std::memset(to + channels, 0, padded - channels);
  }
}

// In place of padded rows: what dot products take, and the number that was added to every code.
#ifdef __AVX512VNNI__
constexpr int OFFSET = 128;  // dpbusd multiplies unsigned by signed
void convert_rows(Code* to, const int8_t* x, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = static_cast<int8_t>(x[i] ^ -128);
}
#else
constexpr int OFFSET = 0;
void convert_rows(Code* to, const int8_t* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    int16_t pairs[2];
    std::memcpy(pairs, x + i, sizeof(pairs));
    for (int j = 0; j < 2; j++) {
      to[i + j] = static_cast<int16_t>(static_cast<int16_t>(static_cast<uint16_t>(pairs[j]) << 8) >> 8);
      to[i + 2 + j] = static_cast<int16_t>(pairs[j] >> 8);
    }
  }
}
#endif

// --- the result ---

// Qparams of rows, and of what their results become.
struct Rows {
  const float* scale;
  const int32_t* zero_point;
  const float* inv_scale;
  const float* new_zero_point;
};

// Parameters of a block of output channels, zeros where there are no channels.
struct Features {
  int64_t count;
  alignas(64) int32_t sum[FEATURES_IN_BLOCK];
  alignas(64) float scale[FEATURES_IN_BLOCK], bias[FEATURES_IN_BLOCK], inv_smooth[FEATURES_IN_BLOCK];

  void read(const PackedWeight& w, const float* smooth, int64_t begin, int64_t end) {
    count = std::min(end, w.features) - begin;
    const auto copy = [&](auto* to, const auto* from) {
      std::fill(std::copy(from + begin, from + begin + count, to), to + (end - begin), 0);
    };
    copy(sum, w.sum);
    copy(scale, w.scale);
    // what is not there changes nothing, not even the sign of a zero
    w.bias ? copy(bias, w.bias) : std::fill(bias, bias + (end - begin), -0.0f);
    smooth ? copy(inv_smooth, smooth) : std::fill(inv_smooth, inv_smooth + (end - begin), 1.0f);
  }
};

// All lanes of a vector, or the first ones; none if their number is negative.
template <bool ALL, class T, class V>
inline void store(T* to, V value, int64_t count) {
  if constexpr (ALL) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    T lanes[WIDTH];
    std::memcpy(lanes, &value, sizeof(value));
    for (int64_t i = 0; i < std::min(count, WIDTH); i++) to[i] = lanes[i];
  }
}

// Where results go: put() takes N vectors of row r, from channel c on, of which `count` lanes are there.
struct Floats {
  float* y;
  int64_t stride;

  Floats at(int64_t r, int64_t c) const { return {y + r * stride + c, stride}; }

  template <bool ALL, int N>
  void put(const Rows&, const Features&, int64_t r, int64_t c, int64_t count, const f32xw (&values)[N]) const {
    for (int i = 0; i < N; i++) store<ALL>(y + r * stride + c + i * WIDTH, values[i], count - i * WIDTH);
  }
};

struct Halves {
  uint16_t* y;
  int64_t stride;

  Halves at(int64_t r, int64_t c) const { return {y + r * stride + c, stride}; }

  template <bool ALL, int N>
  void put(const Rows&, const Features&, int64_t r, int64_t c, int64_t count, const f32xw (&values)[N]) const {
    for (int i = 0; i < N; i++) {
      const auto bits = (u32xw)values[i];
      const u32xw rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
      const auto half = __builtin_convertvector(values[i] == values[i] ? rounded : quiet, u16xw);
      store<ALL>(y + r * stride + c + i * WIDTH, half, count - i * WIDTH);
    }
  }
};

#ifdef __AVX512VNNI__
// The same with an instruction that all processors with AMX have, and that takes denormal numbers for zeros.
struct NormalHalves {
  uint16_t* y;
  int64_t stride;

  NormalHalves at(int64_t r, int64_t c) const { return {y + r * stride + c, stride}; }

  template <bool ALL, int N>
  void put(const Rows&, const Features&, int64_t r, int64_t c, int64_t count, const f32xw (&values)[N]) const {
    for (int i = 0; i < N; i += 2) {
      __m512i halves;
      __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(values[i + 1]), "v"(values[i]));
      uint16_t* to = y + r * stride + c + i * WIDTH;
      const int64_t left = std::min(count - i * WIDTH, 2 * WIDTH);
      ALL ? _mm512_storeu_si512(to, halves) : _mm512_mask_storeu_epi16(to, left > 0 ? ~uint32_t{0} >> (32 - left) : 0, halves);
    }
  }
};
#endif

// reference.quantize of the GELU, rounded as in quantize.cpp.
struct Codes {
  int8_t* y;
  int64_t stride;
  float low, high;

  Codes at(int64_t r, int64_t c) const { return {y + r * stride + c, stride, low, high}; }

  template <bool ALL, int N>
  void put(const Rows& rows, const Features& f, int64_t r, int64_t c, int64_t count, const f32xw (&values)[N]) const {
    constexpr float FAR = 1024.0f, MAGIC = 12582912.0f;
    const f32xw inv_scale = fill(rows.inv_scale[r]), zero_point = fill(rows.new_zero_point[r]);
    for (int i = 0; i < N; i++) {
      const f32xw v = gelu(values[i]) * load_as<f32xw>(f.inv_smooth + c + i * WIDTH) * inv_scale;
      const f32xw rounded = (at_most(FAR, at_least(-FAR, v)) + MAGIC) - MAGIC;
      const f32xw code = at_most(high, at_least(low, rounded + zero_point));
      store<ALL>(y + r * stride + c + i * WIDTH, __builtin_convertvector(__builtin_convertvector(code, i32xw), i8xw),
                 count - i * WIDTH);
    }
  }
};

// Rows [begin, end) of sums, GROUPS groups of 16 from channel c of a block on: zero point, rescale, bias.
template <int GROUPS, bool ALL, class Out>
inline void finish_rows(const Out out, const Rows rows, const Features& f, int64_t row, int64_t c, const int32_t* acc,
                        int64_t begin, int64_t end, int offset) {
  constexpr int N = GROUPS * PARTS;
  for (int64_t r = begin; r < end; r++) {
    const i32xw zero_point = i32xw{} + (rows.zero_point[row + r] + offset);
    const f32xw scale = fill(rows.scale[row + r]);
    f32xw values[N];
    for (int i = 0; i < N; i++) {
      const int64_t at = c + i * WIDTH;
      const i32xw exact = load_as<i32xw>(acc + (r * N + i) * WIDTH) - load_as<i32xw>(f.sum + at) * zero_point;
      values[i] = (__builtin_convertvector(exact, f32xw) * scale) * load_as<f32xw>(f.scale + at);
      values[i] = values[i] + load_as<f32xw>(f.bias + at);
    }
    out.template put<ALL>(rows, f, row + r, c, f.count - c, values);
  }
}

template <int GROUPS, class Out>
inline void finish(const Out& out, const Rows& rows, const Features& f, int64_t row, int64_t c, const int32_t* acc,
                   int64_t begin, int64_t end, int offset) {
  if (f.count - c >= GROUPS * TILE) {
    finish_rows<GROUPS, true>(out, rows, f, row, c, acc, begin, end, offset);
  } else {
    finish_rows<GROUPS, false>(out, rows, f, row, c, acc, begin, end, offset);
  }
}

// --- dot products without tiles ---

#if defined(__AVX512VNNI__)
constexpr int ROWS_AT_ONCE = 6, GROUPS_AT_ONCE = 4;  // as many sums as there are registers for
inline i32xw dot(i32xw sum, int32_t x, i32xw w) {
  return (i32xw)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)w);
}
#elif defined(__AVX2__)
constexpr int ROWS_AT_ONCE = 4, GROUPS_AT_ONCE = 1;
inline i32xw dot(i32xw sum, int32_t x, i32xw w) { return sum + (i32xw)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x)); }
#elif defined(__SSE2__)
constexpr int ROWS_AT_ONCE = 2, GROUPS_AT_ONCE = 1;
inline i32xw dot(i32xw sum, int32_t x, i32xw w) { return sum + (i32xw)_mm_madd_epi16((__m128i)w, _mm_set1_epi32(x)); }
#else
constexpr int ROWS_AT_ONCE = 2, GROUPS_AT_ONCE = 1;
inline i32xw dot(i32xw sum, int32_t x, i32xw w) {
  return sum + ((w << 16) >> 16) * ((x << 16) >> 16) + (w >> 16) * (x >> 16);
}
#endif

// Sums of ROWS rows by GROUPS groups of 16 output channels, `group` codes apart.
template <int ROWS, int GROUPS>
inline void multiply(int32_t* acc, const Code* x, int64_t stride, const Code* w, int64_t group, int64_t padded) {
  i32xw sums[ROWS][GROUPS][PARTS] = {};
  for (int64_t d = 0; d < padded; d += PER_LANE) {
    i32xw weights[GROUPS][PARTS];
    for (int g = 0; g < GROUPS; g++) {
      for (int p = 0; p < PARTS; p++) weights[g][p] = load_as<i32xw>(w + g * group + d * TILE + p * (VECTOR / PARTS));
    }
    for (int r = 0; r < ROWS; r++) {
      const auto codes = load_as<int32_t>(x + r * stride + d);
      for (int g = 0; g < GROUPS; g++) {
        for (int p = 0; p < PARTS; p++) sums[r][g][p] = dot(sums[r][g][p], codes, weights[g][p]);
      }
    }
  }
  std::memcpy(acc, sums, sizeof(sums));
}

// Rows from r on, ROWS at once, fewer at the end.
template <int GROUPS, int ROWS = ROWS_AT_ONCE, class Out>
void multiply_rows(const Out& out, const Rows& rows, const Features& f, const Code* x, const Code* w, int64_t padded,
                   int64_t c, int64_t count, int64_t r = 0) {
  for (; r + ROWS <= count; r += ROWS) {
    alignas(64) int32_t acc[ROWS * GROUPS * TILE];
    multiply<ROWS, GROUPS>(acc, x + r * padded, padded, w + c * padded, TILE * padded, padded);
    finish<GROUPS>(out, rows, f, r, c, acc, 0, ROWS, OFFSET);
  }
  if constexpr (ROWS > 1) multiply_rows<GROUPS, ROWS / 2>(out, rows, f, x, w, padded, c, count, r);
}

// Output channels from c on, GROUPS groups at once, fewer at the end.
template <int GROUPS = GROUPS_AT_ONCE, class Out>
void multiply_all(const Out& out, const Rows& rows, const Features& f, const Code* x, const Code* w, int64_t padded,
                  int64_t count, int64_t c = 0) {
  for (; c + (GROUPS - 1) * TILE < f.count; c += GROUPS * TILE) {
    multiply_rows<GROUPS>(out, rows, f, x, w, padded, c, count);
  }
  if constexpr (GROUPS > 1) multiply_all<GROUPS / 2>(out, rows, f, x, w, padded, count, c);
}

// --- the work ---

// A block of rows, of one direction.
struct RowBlock {
  int64_t direction = 0, first = 0, count = 0, stride = 0;
  const int8_t* x = nullptr;  // padded to whole tiles
  Rows rows = {};

  void read(const Linear& q, int64_t block) {
    direction = block / q.row_blocks(), first = block % q.row_blocks() * q.rows_in_block;
    count = std::min(q.rows_in_block, q.rows - first);
    stride = round_up(q.weight.channels, STEP);
    x = q.x + (direction * q.rows + first) * q.weight.channels;
    if (stride != q.weight.channels) {
      auto* copy = row_memory.take<int8_t>(count * stride);
      copy_rows(copy, stride, x, q.weight.channels, count, q.weight.channels);
      x = copy;
    }
    auto* memory = qparam_memory.take<float>(4 * count);
    const auto copy = [&](auto* to, const auto* from, int64_t scales) {
      for (int64_t r = 0, i = first % scales; r < count; r++, i = i + 1 == scales ? 0 : i + 1) to[r] = from[i];
    };
    auto* zero_point = reinterpret_cast<int32_t*>(memory + count);
    copy(memory, q.x_scale + direction * q.scales, q.scales);
    copy(zero_point, q.zero_point + direction * q.scales, q.scales);
    if (q.gelu_codes) {
      copy(memory + 2 * count, q.gelu.inv_scale, q.gelu.scales);
      copy(memory + 3 * count, q.gelu.zero_point, q.gelu.scales);
    }
    rows = {memory, zero_point, memory + 2 * count, memory + 3 * count};
  }
};

// The part of q's weight that is one direction's.
PackedWeight one_direction(const Linear& q, int64_t direction) {
  PackedWeight w = q.weight;
  const int64_t tiles = round_up(w.features, TILE) / TILE * (round_up(w.channels, STEP) / STEP);
  w.tiles = static_cast<const uint8_t*>(w.tiles) + direction * tiles * (w.nibbles ? CODES / 2 : CODES);
  w.sum += direction * w.features;
  w.scale += direction * w.features;
  if (w.bias) w.bias += direction * w.features;
  return w;
}

template <class Out>
void dot_blocks(const Linear& q, const Out& y, int64_t begin, int64_t end) {
  RowBlock block;
  Features f;
  const Code* x = nullptr;
  for (int64_t item = begin; item < end; item++) {
    if (item == begin || item % q.feature_blocks() == 0) {
      block.read(q, item / q.feature_blocks());
      auto* codes = code_memory.take<Code>(block.count * block.stride);
      convert_rows(codes, block.x, block.count * block.stride);
      x = codes;
    }
    const PackedWeight w = one_direction(q, block.direction);
    const int64_t n = item % q.feature_blocks() * FEATURES_IN_BLOCK;
    f.read(w, q.gelu.inv_smooth, n, n + FEATURES_IN_BLOCK);
    const int64_t groups = round_up(f.count, TILE) / TILE, size = TILE * block.stride;
    auto* memory = weight_memory.take<int8_t>(groups * size * (1 + sizeof(Code)));
    auto* codes = reinterpret_cast<Code*>(memory);
    const Code* weights = read_weight(w, n / TILE, n / TILE + groups, codes, memory + groups * size * sizeof(Code));
    multiply_all(y.at(block.direction * q.rows + block.first, n), block.rows, f, x, weights, block.stride, block.count);
  }
}

// run(where results go)
template <class Run>
void with_output(const Linear& q, const Run& run) {
  const int64_t stride = q.weight.features;
  if (q.gelu_codes) {
    run(Codes{q.gelu_codes, stride, static_cast<float>(q.gelu.low), static_cast<float>(q.gelu.high)});
  } else if (q.y_type == Float::f32) {
    run(Floats{static_cast<float*>(q.y), stride});
  } else {
    run(Halves{static_cast<uint16_t*>(q.y), stride});
  }
}

}  // namespace

void linear(const Linear& q, int64_t begin, int64_t end) {
  with_output(q, [&](const auto& y) { dot_blocks(q, y, begin, end); });
}

void pack(const Pack& q, int64_t begin, int64_t end) {
  const int64_t steps = round_up(q.channels, STEP) / STEP, padded = steps * STEP;
  const int64_t columns = q.nibbles ? (q.channels + 1) / 2 : q.channels;
  auto* rows = row_memory.take<int8_t>(TILE * padded);
  std::memset(rows, 0, TILE * padded);
  for (int64_t group = begin; group < end; group++) {
    for (int64_t i = 0; i < TILE; i++) {
      const int64_t n = group * TILE + i;
      int8_t* row = rows + i * padded;
      if (n >= q.features) {
        std::memset(row, 0, q.channels);
        continue;
      }
      const auto* from = static_cast<const int8_t*>(q.weight) + n * columns;
      if (q.nibbles) {
        for (int64_t d = 0; d < q.channels; d++) {
          const int code = from[d / 2] >> (d % 2 * 4) & 15;
          row[d] = static_cast<int8_t>((code ^ 8) - 8);
        }
      } else {
        std::memcpy(row, from, q.channels);
      }
      int32_t sum = 0;
      for (int64_t d = 0; d < q.channels; d++) sum += row[d];
      q.sum[n] = sum;
    }
    for (int64_t step = 0; step < steps; step++) {
      i32x16 tile[TILE];
      for (int64_t i = 0; i < TILE; i++) tile[i] = load_as<i32x16>(rows + i * padded + step * STEP);
      transpose(tile);
      std::memcpy(q.tiles + (group * steps + step) * CODES, tile, sizeof(tile));
    }
  }
}

void linear_rows(const LinearRows& q, int64_t begin, int64_t end) {
  const int64_t padded = round_up(q.weight.channels, STEP), size = TILE * padded;
  auto* x = code_memory.take<Code>(FEW_ROWS * padded);
  for (int64_t r = 0; r < q.rows; r++) convert_rows(x + r * padded, q.x + r * q.x_stride, padded);
  const Rows rows{q.x_scale, q.zero_point, nullptr, nullptr};
  Features f;
  for (int64_t group = begin; group < end; group++) {
    auto* memory = weight_memory.take<int8_t>(size * (1 + sizeof(Code)));
    auto* codes = reinterpret_cast<Code*>(memory);
    const Code* weights = read_weight(q.weight, group, group + 1, codes, memory + size * sizeof(Code));
    f.read(q.weight, nullptr, group * TILE, (group + 1) * TILE);
    f.count = TILE;
    multiply_rows<1>(Floats{q.y + (group - begin) * TILE, q.y_stride}, rows, f, x, weights, padded, 0, q.rows);
  }
}

#ifdef __AVX512VNNI__

namespace {

#define PTQ4VM_TILES __attribute__((target("amx-tile,amx-int8")))

// All eight tiles have 64 bytes a row.
PTQ4VM_TILES void configure(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } config;
  std::fill(config.rows, config.rows + 8, static_cast<uint8_t>(rows));
  for (int i = 6; i < 8; i++) config.rows[i] = TILE;  // the weight's
  __asm__ volatile("" : : "r"(&config) : "memory");  // for GCC, which believes that eight bytes are read
  _tile_loadconfig(&config);
}

// Two tiles of rows by two of output channels, whose results wait until the next products are under way.
template <class Out>
struct Pending {
  alignas(64) int32_t acc[2 * TILE * 2 * TILE];
  Out out;
  const Rows* rows;
  const Features* features;
  int64_t row, c, next = 0, end = 0;

  inline void finish_some(int64_t count) {
    const int64_t until = std::min(next + count, end);
    if (next >= until) return;
    finish<2>(out, *rows, *features, row, c, acc, next, until, 0);
    next = until;
  }
};

// Four tile registers of sums, two of each operand; `gap`: rows from the first tile to the second.
template <class Out>
PTQ4VM_TILES inline void multiply_tiles(int32_t* acc, const int8_t* x, int64_t stride, int64_t gap, const int8_t* w0,
                                        const int8_t* w1, int64_t padded, Pending<Out>& before) {
  constexpr int64_t ACROSS = 2 * TILE;
  const int64_t share = 2 * TILE * STEP / std::max(padded, STEP) + 1;
  const int8_t* x1 = x + gap * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < padded; d += STEP) {
    _tile_loadd(6, w0 + d * TILE, STEP);
    _tile_loadd(4, x + d, stride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, w1 + d * TILE, STEP);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, x1 + d, stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    before.finish_some(share);
  }
  before.finish_some(2 * TILE);
  _tile_stored(0, acc, ACROSS * sizeof(int32_t));
  _tile_stored(1, acc + TILE, ACROSS * sizeof(int32_t));
  _tile_stored(2, acc + gap * ACROSS, ACROSS * sizeof(int32_t));
  _tile_stored(3, acc + gap * ACROSS + TILE, ACROSS * sizeof(int32_t));
}

template <class Out>
PTQ4VM_TILES void tile_blocks(const Linear& q, const Out& y, int64_t begin, int64_t end) {
  RowBlock block;
  Features features[2];
  Pending<Out> pending[2];
  int64_t height = 0, turn = 0;
  for (int64_t item = begin; item < end; item++) {
    if (item == begin || item % q.feature_blocks() == 0) {
      pending[turn].finish_some(2 * TILE);
      block.read(q, item / q.feature_blocks());
      // Pairs of equally high tiles, the last of which may overlap the one before.
      const int64_t pairs = (block.count + 2 * TILE - 1) / (2 * TILE);
      height = (block.count + 2 * pairs - 1) / (2 * pairs);
      configure(height);
    }
    const PackedWeight w = one_direction(q, block.direction);
    const int64_t n = item % q.feature_blocks() * FEATURES_IN_BLOCK;
    Features& f = features[item % 2];
    f.read(w, q.gelu.inv_smooth, n, n + FEATURES_IN_BLOCK);
    const int64_t groups = round_up(f.count, TILE) / TILE, size = TILE * block.stride;
    auto* unpacked = weight_memory.take<int8_t>(w.nibbles ? groups * size : 0);
    const Code* weights = read_weight(w, n / TILE, n / TILE + groups, nullptr, unpacked);
    __asm__ volatile("" ::: "memory");  // GCC does not know that tile loads read memory
    const Out out = y.at(block.direction * q.rows + block.first, n);
    for (int64_t c = 0; c < f.count; c += 2 * TILE) {
      const int8_t* w0 = weights + c * block.stride;
      const int8_t* w1 = c + TILE < f.count ? w0 + size : w0;
      for (int64_t row = 0; row < block.count; row += 2 * height) {
        const int64_t start = std::max<int64_t>(0, std::min(row, block.count - 2 * height));
        const int64_t gap = std::min(height, block.count - height);
        Pending<Out>& now = pending[turn ^ 1];
        multiply_tiles(now.acc, block.x + start * block.stride, block.stride, gap, w0, w1, block.stride, pending[turn]);
        now.out = out, now.rows = &block.rows, now.features = &f, now.row = start, now.c = c;
        now.next = row - start, now.end = std::min(2 * height, block.count);
        turn ^= 1;
      }
    }
  }
  pending[turn].finish_some(2 * TILE);
  _tile_release();
}

}  // namespace

void linear_amx(const Linear& q, int64_t begin, int64_t end) {
  if (!q.gelu_codes && q.y_type == Float::bf16 && q.normal) {
    return tile_blocks(q, NormalHalves{static_cast<uint16_t*>(q.y), q.weight.features}, begin, end);
  }
  with_output(q, [&](const auto& y) { tile_blocks(q, y, begin, end); });
}

void begin_tiles() { configure(TILE); }

PTQ4VM_TILES void end_tiles() { _tile_release(); }

PTQ4VM_TILES void linear_rows_amx(const LinearRows& q, int64_t begin, int64_t end) {
  const int64_t padded = round_up(q.weight.channels, STEP);
  auto* unpacked = weight_memory.take<int8_t>(q.weight.nibbles ? TILE * padded : 0);
  const Rows rows{q.x_scale, q.zero_point, nullptr, nullptr};
  alignas(64) int32_t acc[FEW_ROWS * TILE];
  Features f;
  for (int64_t group = begin; group < end; group++) {
    f.read(q.weight, nullptr, group * TILE, (group + 1) * TILE);
    f.count = TILE;
    const int8_t* w = read_weight(q.weight, group, group + 1, nullptr, unpacked);
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t d = 0; d < padded; d += STEP) {
      _tile_loadd(6, w + d * TILE, STEP);
      _tile_loadd(4, q.x + d, q.x_stride);
      _tile_dpbssd(0, 4, 6);
      if (q.rows > TILE) {
        _tile_loadd(5, q.x + TILE * q.x_stride + d, q.x_stride);
        _tile_dpbssd(1, 5, 6);
      }
    }
    _tile_stored(0, acc, STEP);
    _tile_stored(1, acc + TILE * TILE, STEP);
    finish<1>(Floats{q.y + (group - begin) * TILE, q.y_stride}, rows, f, 0, 0, acc, 0, q.rows, 0);
  }
}

#endif

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
