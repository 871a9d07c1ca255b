// The integer linear that computes dt, Δ, in a directional scan.
#pragma once

#include "quantize.h"
#include "scan_chunk.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

constexpr int64_t QUAD = 4 * LANES;  // bytes in a row of a packed weight: 4 codes for each of 16 output channels

// Computes dt before bias and softplus, for the tokens of a chunk: their codes are quantized here, and the weight of a
// panel of channels is unpacked once for a direction. Floats hold the sums: |code - zero point| and |code + 128| are
// below 256, |weight| is at most 128, so that 512 products stay within 2^24.
class DtProjection {
 public:
  DtProjection(const DirectionalScan& scan, int64_t channels)
      : s(scan), rank(round_up(s.rank, 4)), low_rank(round_up(s.rank, LANES)), inv_smooth(low_rank.size(), 1.0f),
        codes(CHUNK * rank), weight(round_up(channels, LANES) * rank) {}

  void begin(int64_t k, int64_t first, int64_t last) {
    direction = k;
    if (s.dt_qparams.inv_smooth) std::copy_n(s.dt_qparams.inv_smooth + k * s.rank, s.rank, inv_smooth.data());
    const int64_t all = groups(s.channels), rows = round_up(s.rank, QUAD) / 4;
    for (int64_t e = first; e < last; e += LANES) {
      for (int64_t r = 0; r < rank; r += 4) {
        int8_t row[QUAD];
        unpack(row, (k * all + e / LANES) * rows + r / 4);
        set_weight(row, e - first, r);
      }
    }
  }

  // Quantizes x (R,) of a token; null stands for zeros.
  void quantize(int64_t t, const float* x, int64_t token) {
    const int64_t i = direction * s.dt_qparams.scales + token % s.dt_qparams.scales;
    scale[t] = x ? s.dt_scale[i] : 0.0f;
    zero_point[t] = x ? static_cast<float>(s.dt_qparams.zero_point[i]) : 0.0f;
    const RowQParams qparams(x ? s.dt_qparams.inv_scale[i] : 0.0f, x ? s.dt_qparams.zero_point[i] : 0, s.dt_qparams.low,
                             s.dt_qparams.high);
    if (x) std::copy_n(x, s.rank, low_rank.data());
    for (int64_t r = 0; r < rank; r += WIDTH) {
      const f32xw value = x ? load_as<f32xw>(&low_rank[r]) * load_as<f32xw>(&inv_smooth[r]) : f32xw{};
      set_codes(rounded_codes(value, qparams), t, r);
    }
  }

#ifdef __AVX512VNNI__
  // Computes the v-th vector of the panel's channels, `channel` and after.
  void multiply(f32xw* y, int64_t v, int64_t channel) const {
    __m512i acc[CHUNK];
    unroll<CHUNK>([&](auto t) { acc[t] = __m512i{}; });
    const int8_t* row = &weight[v * rank * LANES];
    for (const uint8_t* x = codes.data(); x < codes.data() + codes.size(); x += 4 * CHUNK, row += QUAD) {
      const auto w = load_as<__m512i>(row);
      unroll<CHUNK>(
          [&](auto t) { acc[t] = _mm512_dpbusd_epi32(acc[t], _mm512_set1_epi32(load_as<int32_t>(x + 4 * t)), w); });
    }
    const int64_t at = direction * s.channels + channel, left = s.channels - channel;
    const auto sums = (i32xw)load_lanes(reinterpret_cast<const float*>(s.dt_weight_sum) + at, left);
    const f32xw shift = __builtin_convertvector(sums, f32xw), scales = load_lanes(s.dt_weight_scale + at, left);
    unroll<CHUNK>([&](auto t) {
      const f32xw exact = __builtin_convertvector((i32xw)acc[t], f32xw) - shift * (zero_point[t] + OFFSET);
      y[t] = (exact * scale[t]) * scales;
    });
  }

 private:
  // dpbusd takes unsigned times signed: codes are OFFSET more than they are. QuantizedStates are [R / 4][CHUNK][4], the
  // weight is [channels / 16][R / 4][16][4].
  static constexpr float OFFSET = 128.0f;

  void set_codes(f32xw values, int64_t t, int64_t r) {
    typedef uint8_t u8xw __attribute__((vector_size(WIDTH)));
    const u8xw shifted = __builtin_convertvector(__builtin_convertvector(values + OFFSET, i32xw), u8xw);
    for (int64_t i = 0; i < std::min(WIDTH, rank - r); i += 4) {
      std::memcpy(&codes[((r + i) / 4 * CHUNK + t) * 4], reinterpret_cast<const uint8_t*>(&shifted) + i, 4);
    }
  }

  void set_weight(const int8_t* lanes, int64_t channel, int64_t r) {
    std::copy_n(lanes, QUAD, &weight[channel * rank + r / 4 * QUAD]);
  }

  using Code = uint8_t;
  using Weight = int8_t;
#else
  void multiply(f32xw* y, int64_t v, int64_t channel) const {
    const int64_t at = direction * s.channels + channel;
    const f32xw scales = load_lanes(s.dt_weight_scale + at, s.channels - channel);
    constexpr int ROWS = 4;
    for (int64_t t0 = 0; t0 < CHUNK; t0 += ROWS) {
      f32xw acc[ROWS];
      unroll<ROWS>([&](auto t) { acc[t] = f32xw{}; });
      for (int64_t r = 0; r < rank; r++) {
        const auto w = load_as<f32xw>(&weight[(v * rank + r) * WIDTH]);
        unroll<ROWS>([&](auto t) { acc[t] += w * codes[(t0 + t) * rank + r]; });
      }
      unroll<ROWS>([&](auto t) { y[t0 + t] = (acc[t] * scale[t0 + t]) * scales; });
    }
  }

 private:
  void set_codes(f32xw values, int64_t t, int64_t r) {
    store_lanes(&codes[t * rank + r], values - zero_point[t], rank - r);
  }

  // [channels / WIDTH][R][WIDTH]
  void set_weight(const int8_t* lanes, int64_t channel, int64_t r) {
    for (int64_t e = channel; e < channel + LANES; e++) {
      for (int64_t i = 0; i < 4; i++) weight[(e / WIDTH * rank + r + i) * WIDTH + e % WIDTH] = *lanes++;
    }
  }

  using Code = float;
  using Weight = float;
#endif

  // A row of the packed weight.
  void unpack(int8_t* to, int64_t row) const {
    if (s.packed) return unpack_nibbles(to, static_cast<const uint8_t*>(s.dt_weight) + row * (QUAD / 2));
    std::copy_n(static_cast<const int8_t*>(s.dt_weight) + row * QUAD, QUAD, to);
  }

  const DirectionalScan& s;
  const int64_t rank;
  int64_t direction = 0;
  std::vector<float> low_rank, inv_smooth;
  std::vector<Code> codes;
  std::vector<Weight> weight;
  float scale[CHUNK] = {};
  float zero_point[CHUNK] = {};
};

}  // namespace
}  // namespace ptq4vm::PTQ4VM_SET
