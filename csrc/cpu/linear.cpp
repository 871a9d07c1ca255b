// fused.linear_packed and what is built on it: the accumulators are exact, and every output is rounded as the reference
// rounds it. Compiled without contraction.
//
// Weights come in tiles: 64 input channels of 16 output channels, the operand of AMX and of VNNI as it lies in memory.
// The work is cut into blocks of rows by blocks of 64 output channels. Within one, two or four groups of 16 channels
// pass over all rows; the sums of a few rows go through a small buffer to be rescaled and stored.
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "math.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

constexpr int64_t TILE = 16;              // rows, or output channels
constexpr int64_t STEP = 64;              // channels in that a tile holds
constexpr int64_t CODES = TILE * STEP;    // in a tile
constexpr int64_t PARTS = LANES / WIDTH;  // registers of 16 sums

typedef int32_t i32xw __attribute__((vector_size(WIDTH * sizeof(int32_t))));
typedef int8_t i8xw __attribute__((vector_size(WIDTH)));
typedef uint16_t u16xw __attribute__((vector_size(WIDTH * sizeof(uint16_t))));

inline i32xw splat(int32_t value) { return i32xw{} + value; }

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

struct Scratch {
  std::vector<uint8_t> memory;
  template <class T>
  T* take(size_t count) {  // 64-byte aligned; what it held before is gone
    if (memory.size() < count * sizeof(T) + 64) memory.resize(count * sizeof(T) + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  }
};

thread_local Scratch nibble_memory, weight_memory, row_memory, code_memory, qparam_memory;

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

// Groups [begin, end) of 16 output channels; valid until the next call in this thread.
const Code* read_weight(const PackedWeight& w, int64_t begin, int64_t end) {
  const int64_t steps = round_up(w.channels, STEP) / STEP, tiles = (end - begin) * steps;
  const auto* from = static_cast<const int8_t*>(w.tiles) + begin * steps * (w.nibbles ? CODES / 2 : CODES);
  if (w.nibbles) {
    auto* unpacked = nibble_memory.take<int8_t>(tiles * CODES);
    unpack(unpacked, reinterpret_cast<const uint8_t*>(from), tiles);
    from = unpacked;
  }
#ifdef __AVX512VNNI__
  return from;
#else
  auto* codes = weight_memory.take<Code>(tiles * CODES);
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

// Rows as dot products take them.
#ifdef __AVX512VNNI__
constexpr int OFFSET = 128;  // that is added: dpbusd multiplies unsigned by signed
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

// sum + the two products of 16-bit numbers in each lane
#if defined(__AVX512VNNI__)
inline i32xw add_products(i32xw sum, i32xw a, i32xw b) {
  return (i32xw)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__)
inline i32xw add_products(i32xw sum, i32xw a, i32xw b) {
  return sum + (i32xw)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#elif defined(__SSE2__)
inline i32xw add_products(i32xw sum, i32xw a, i32xw b) { return sum + (i32xw)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
inline i32xw add_products(i32xw sum, i32xw a, i32xw b) {
  return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}
#endif

inline int32_t pair(int first, int second) {
  const int16_t both[] = {static_cast<int16_t>(first), static_cast<int16_t>(second)};
  return load_as<int32_t>(both);
}

// Two pairs whose products are -zero_point · sum: one instruction, where a multiplication and a subtraction are three.
inline int32_t zero_point_pair(int32_t zero_point) { return pair(zero_point, zero_point * 256); }

inline int32_t sum_pair(int32_t sum) {
  const int low = static_cast<int8_t>(sum & 255);
  return pair(-low, -((sum - low) >> 8));
}

// Qparams of a row, and of what its results become.
struct Row {
  int32_t zero_point;  // a pair
  float scale, inv_scale;
  int32_t new_zero_point;
};

// Parameters of a block of output channels, zeros where there are no channels.
struct Features {
  int64_t count;
  alignas(64) int32_t start[FEATURES_IN_BLOCK], sum[FEATURES_IN_BLOCK];  // of dot products; pairs
  alignas(64) float scale[FEATURES_IN_BLOCK], bias[FEATURES_IN_BLOCK], inv_smooth[FEATURES_IN_BLOCK];

  void read(const PackedWeight& w, const float* smooth, int64_t begin, int64_t end) {
    count = std::min(end, w.features) - begin;
    const int64_t size = end - begin;
    const auto copy = [&](auto* to, const auto* from) {
      std::fill(std::copy(from + begin, from + begin + count, to), to + size, 0);
    };
    copy(sum, w.sum);
    for (int64_t i = 0; i < size; i++) {
      start[i] = -OFFSET * sum[i];
      sum[i] = sum_pair(sum[i]);
    }
    copy(scale, w.scale);
    // what is not there changes nothing, not even the sign of a zero
    w.bias ? copy(bias, w.bias) : std::fill(bias, bias + size, -0.0f);
    smooth ? copy(inv_smooth, smooth) : std::fill(inv_smooth, inv_smooth + size, 1.0f);
  }
};

// The first lanes of a vector; none if their number is negative.
#ifdef __AVX512F__
inline uint32_t first_lanes(int64_t count, int64_t all) {
  return count <= 0 ? 0 : ~uint32_t{0} >> (32 - std::min(count, all));
}

inline void store(float* to, f32xw value, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count, WIDTH), value);
}

inline void store(uint16_t* to, u16xw value, int64_t count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count, WIDTH), (__m256i)value);
}

inline void store(int8_t* to, i8xw value, int64_t count) {
  _mm_mask_storeu_epi8(to, first_lanes(count, WIDTH), (__m128i)value);
}
#else
template <class T, class V>
inline void store(T* to, V value, int64_t count) {
  if (count >= WIDTH) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    T lanes[WIDTH];
    std::memcpy(lanes, &value, sizeof(value));
    for (int64_t i = 0; i < count; i++) to[i] = lanes[i];
  }
}
#endif

// Where results go: put() takes N vectors of a row, of which `count` lanes are there.
template <class T>
struct Results {
  T* y;
  int64_t stride;

  T* at(int64_t row, int64_t channel) const { return y + row * stride + channel; }
};

// The results from some row and channel on.
template <class Out>
Out moved(Out out, int64_t row, int64_t channel) {
  out.y = out.at(row, channel);
  return out;
}

struct Floats : Results<float> {
  template <int N>
  void put(float* to, int64_t count, const Row&, const float*, const f32xw (&values)[N]) const {
    for (int i = 0; i < N; i++) store(to + i * WIDTH, values[i], count - i * WIDTH);
  }
};

struct Halves : Results<uint16_t> {
  template <int N>
  void put(uint16_t* to, int64_t count, const Row&, const float*, const f32xw (&values)[N]) const {
    for (int i = 0; i < N; i++) {
      const auto bits = (u32xw)values[i];
      const u32xw rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
      const auto half = __builtin_convertvector(values[i] == values[i] ? rounded : quiet, u16xw);
      store(to + i * WIDTH, half, count - i * WIDTH);
    }
  }
};

#ifdef __AVX512VNNI__
// The same with an instruction that all processors with AMX have, and that takes denormal numbers for zeros.
struct NormalHalves : Results<uint16_t> {
  template <int N>
  void put(uint16_t* to, int64_t count, const Row&, const float*, const f32xw (&values)[N]) const {
    for (int i = 0; i < N; i += 2) {
      __m512i halves;
      __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(values[i + 1]), "v"(values[i]));
      _mm512_mask_storeu_epi16(to + i * WIDTH, first_lanes(count - i * WIDTH, 2 * WIDTH), halves);
    }
  }
};
#endif

// reference.quantize of the GELU. Clamping before the sum with the zero point gives the same codes, and the sum of a
// small number and MAGIC has the nearest integer in its low bits.
struct Codes : Results<int8_t> {
  float low, high;

  template <int N>
  void put(int8_t* to, int64_t count, const Row& row, const float* inv_smooth, const f32xw (&values)[N]) const {
    constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23
    const auto zero_point = static_cast<float>(row.new_zero_point);
    for (int i = 0; i < N; i++) {
      const f32xw v = gelu(values[i]) * load_as<f32xw>(inv_smooth + i * WIDTH) * fill(row.inv_scale);
      const f32xw shifted = at_most(high - zero_point, at_least(low - zero_point, v)) + MAGIC;
      const i32xw codes = (i32xw)shifted + splat(row.new_zero_point);
      store(to + i * WIDTH, __builtin_convertvector(codes, i8xw), count - i * WIDTH);
    }
  }
};

// Sums of rows by GROUPS groups of 16 channels, from channel c of a block on: zero point, rescale, bias.
template <int GROUPS, class Out>
class Finish {
 public:
  // out: of the block's first channel
  Finish(const Out& out, const Row* rows, const Features& f, int64_t c, const int32_t* acc)
      : out_(out), rows_(rows), acc_(acc), inv_smooth_(f.inv_smooth + c), c_(c), count_(f.count - c) {
    for (int i = 0; i < N; i++) {
      sum_[i] = load_as<i32xw>(f.sum + c + i * WIDTH);
      scale_[i] = load_as<f32xw>(f.scale + c + i * WIDTH);
      bias_[i] = load_as<f32xw>(f.bias + c + i * WIDTH);
    }
  }

  void operator()(int64_t begin, int64_t end) const {
    const int32_t* acc = acc_ + begin * N * WIDTH;
    auto* to = out_.at(begin, c_);
    for (const Row *row = rows_ + begin, *last = rows_ + end; row < last; row++, acc += N * WIDTH, to += out_.stride) {
      f32xw values[N];
      for (int i = 0; i < N; i++) {
        const i32xw exact = add_products(load_as<i32xw>(acc + i * WIDTH), sum_[i], splat(row->zero_point));
        values[i] = (__builtin_convertvector(exact, f32xw) * fill(row->scale)) * scale_[i] + bias_[i];
      }
      out_.put(to, count_, *row, inv_smooth_, values);
    }
  }

 private:
  static constexpr int N = GROUPS * PARTS;
  const Out out_;
  const Row* const rows_;
  const int32_t* const acc_;
  const float* const inv_smooth_;
  const int64_t c_, count_;
  i32xw sum_[N];
  f32xw scale_[N], bias_[N];
};

// --- dot products without tiles ---

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
void multiply_rows(const Out& out, const Row* rows, const Features& f, const Code* x, const Code* w, int64_t padded,
                   int64_t c, int64_t count, int64_t r = 0) {
  for (; r + ROWS <= count; r += ROWS) {
    alignas(64) int32_t acc[ROWS * GROUPS * TILE];
    multiply<ROWS, GROUPS>(acc, f.start + c, x + r * padded, padded, w + c * padded, TILE * padded, padded);
    Finish<GROUPS, Out>(moved(out, r, 0), rows + r, f, c, acc)(0, ROWS);
  }
  if constexpr (ROWS > 1) multiply_rows<GROUPS, ROWS / 2>(out, rows, f, x, w, padded, c, count, r);
}

// Output channels from c on, GROUPS groups at once, fewer at the end.
template <int GROUPS = GROUPS_AT_ONCE, class Out>
void multiply_all(const Out& out, const Row* rows, const Features& f, const Code* x, const Code* w, int64_t padded,
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
  Row* rows = nullptr;

  void read(const Linear& q, int64_t block) {
    direction = block / q.row_blocks(), first = block % q.row_blocks() * q.rows_in_block;
    count = std::min(q.rows_in_block, q.rows - first);
    stride = round_up(q.weight.channels, STEP);
    x = q.x + (direction * q.rows + first) * q.weight.channels;
    if (stride != q.weight.channels) {
      auto* padded = row_memory.take<int8_t>(count * stride);
      for (int64_t r = 0; r < count; r++) {
        int8_t* to = padded + r * stride;
        std::copy_n(x + r * q.weight.channels, q.weight.channels, to);
        std::memset(to + q.weight.channels, 0, stride - q.weight.channels);
      }
      x = padded;
    }
    rows = qparam_memory.take<Row>(count);
    const auto at = [&](int64_t r, int64_t scales) { return direction * scales + (first + r) % scales; };
    for (int64_t r = 0; r < count; r++) {
      const int64_t i = at(r, q.scales);
      rows[r] = {zero_point_pair(q.zero_point[i]), q.x_scale[i], 0.0f, 0};
    }
    for (int64_t r = 0; q.gelu_codes && r < count; r++) {
      const int64_t i = at(r, q.gelu.scales);
      rows[r].inv_scale = q.gelu.inv_scale[i], rows[r].new_zero_point = q.gelu.zero_point[i];
    }
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

// The output channels of an item of the work, which are next to one another in turn; gives their codes.
const Code* read_features(Features& f, const Linear& q, const RowBlock& block, int64_t item) {
  const PackedWeight w = one_direction(q, block.direction);
  const int64_t n = item % q.feature_blocks() * FEATURES_IN_BLOCK;
  f.read(w, q.gelu.inv_smooth, n, n + FEATURES_IN_BLOCK);
  return read_weight(w, n / TILE, (n + round_up(f.count, TILE)) / TILE);
}

template <class Out>
Out results(const Out& y, const Linear& q, const RowBlock& block, int64_t item) {
  return moved(y, block.direction * q.rows + block.first - q.first_row, item % q.feature_blocks() * FEATURES_IN_BLOCK);
}

template <class Out>
void dot_blocks(const Linear& q, const Out& y, int64_t begin, int64_t end) {
  RowBlock block;
  Features f;
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

// run(where results go)
template <class Run>
void with_output(const Linear& q, const Run& run) {
  const int64_t stride = q.weight.features;
  if (q.gelu_codes) {
    run(Codes{{q.gelu_codes, stride}, static_cast<float>(q.gelu.low), static_cast<float>(q.gelu.high)});
  } else if (q.y_type == Float::f32) {
    run(Floats{{static_cast<float*>(q.y), stride}});
  } else {
    run(Halves{{static_cast<uint16_t*>(q.y), stride}});
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
        std::copy_n(from, q.channels, row);
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

#ifdef __AVX512VNNI__

namespace {

#define PTQ4VM_TILES __attribute__((target("amx-tile,amx-int8")))

// GCC does not know how much memory the loads of tiles and of their configuration read.
inline void write_all() { __asm__ volatile("" ::: "memory"); }

// All eight tiles have 64 bytes a row; those of weights have 16 rows.
PTQ4VM_TILES void configure(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; i++) config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : TILE);
  __asm__ volatile("" : : "r"(&config));  // its address is known elsewhere from here on
  write_all();
  _tile_loadconfig(&config);
}

// Sums of two tiles of rows by two of output channels, which wait until the next products are under way.
template <class Out>
struct Pending {
  alignas(64) int32_t acc[2 * TILE * 2 * TILE];
  Out out = {};
  const Row* rows = nullptr;
  const Features* features = nullptr;
  int64_t c = 0, begin = 0, end = 0;
};

// Four tile registers of sums, two of each operand; `gap`: rows from the first tile to the second.
template <class Out>
PTQ4VM_TILES __attribute__((noinline)) void multiply_tiles(int32_t* acc, const int8_t* x, int64_t stride, int64_t gap,
                                                           const int8_t* w0, const int8_t* w1, int64_t padded,
                                                           const Pending<Out>& before) {
  constexpr int64_t ACROSS = 2 * TILE, SHARE = 4;  // rows to finish a step: always as many, which is easy to predict
  const Finish<2, Out> finish(before.out, before.rows, *before.features, before.c, before.acc);
  int64_t next = before.begin;
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
    finish(next, std::min(next + SHARE, before.end));
    next += SHARE;
  }
  finish(next, before.end);
  _tile_stored(0, acc, ACROSS * sizeof(int32_t));
  _tile_stored(1, acc + TILE, ACROSS * sizeof(int32_t));
  _tile_stored(2, acc + gap * ACROSS, ACROSS * sizeof(int32_t));
  _tile_stored(3, acc + gap * ACROSS + TILE, ACROSS * sizeof(int32_t));
}

template <class Out>
PTQ4VM_TILES void tile_blocks(const Linear& q, const Out& y, int64_t begin, int64_t end) {
  RowBlock block;
  Features features[2] = {};
  Pending<Out> pending[2];
  for (Pending<Out>& nothing : pending) nothing.features = features;
  int64_t height = 0, turn = 0;
  const auto finish = [&](Pending<Out>& last) {
    Finish<2, Out>(last.out, last.rows, *last.features, last.c, last.acc)(last.begin, last.end);
    last.end = 0;
  };
  for (int64_t item = begin; item < end; item++) {
    if (item == begin || item % q.feature_blocks() == 0) {
      finish(pending[turn]);
      block.read(q, item / q.feature_blocks());
      // Pairs of equally high tiles, the last of which may overlap the one before.
      const int64_t pairs = (block.count + 2 * TILE - 1) / (2 * TILE);
      height = (block.count + 2 * pairs - 1) / (2 * pairs);
      configure(height);
    }
    Features& f = features[item % 2];
    const int8_t* weights = read_features(f, q, block, item);
    write_all();
    const Out out = results(y, q, block, item);
    for (int64_t c = 0; c < f.count; c += 2 * TILE) {
      const int8_t* w0 = weights + c * block.stride;
      const int8_t* w1 = c + TILE < f.count ? w0 + TILE * block.stride : w0;
      for (int64_t row = 0; row < block.count; row += 2 * height) {
        const int64_t start = std::max<int64_t>(0, std::min(row, block.count - 2 * height));
        const int64_t gap = std::min(height, block.count - height);
        Pending<Out>& now = pending[turn ^ 1];
        multiply_tiles(now.acc, block.x + start * block.stride, block.stride, gap, w0, w1, block.stride, pending[turn]);
        now.out = moved(out, start, 0), now.rows = block.rows + start, now.features = &f, now.c = c;
        now.begin = row - start, now.end = std::min(2 * height, block.count);
        turn ^= 1;
      }
    }
  }
  finish(pending[turn]);
  _tile_release();
}

}  // namespace

void linear_amx(const Linear& q, int64_t begin, int64_t end) {
  if (!q.gelu_codes && q.y_type == Float::bf16 && q.normal) {
    return tile_blocks(q, NormalHalves{{static_cast<uint16_t*>(q.y), q.weight.features}}, begin, end);
  }
  with_output(q, [&](const auto& y) { tile_blocks(q, y, begin, end); });
}

#endif

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
