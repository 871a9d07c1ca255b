// The linear on AMX: tiles of 16 rows by 16 output channels, whose sums are finished while the next ones multiply.
#include "linear_blocks.h"

#ifdef __AVX512VNNI__

namespace ptq4vm::PTQ4VM_SET {
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
  const LinearRowQParams* rows = nullptr;
  const FeatureParameters* features = nullptr;
  int64_t c = 0, begin = 0, end = 0;
};

// Four tile registers of sums, two of each operand; `gap`: rows from the first tile to the second.
template <class Out>
PTQ4VM_TILES __attribute__((noinline)) void multiply_tiles(int32_t* acc, const int8_t* x, int64_t stride, int64_t gap,
                                                           const int8_t* w0, const int8_t* w1, int64_t padded,
                                                           const Pending<Out>& before) {
  constexpr int64_t ACROSS = 2 * TILE,
                    SHARE = 4;  // rows to finish beside a tile of channels: always as many, which is easy to predict
  const Epilogue<2, Out> finish(before.out, before.rows, *before.features, before.c, before.acc);
  int64_t next = before.begin;
  const int8_t* x1 = x + gap * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < padded; d += K_TILE) {
    _tile_loadd(6, w0 + d * TILE, K_TILE);
    _tile_loadd(4, x + d, stride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, w1 + d * TILE, K_TILE);
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
  FeatureParameters features[2] = {};
  Pending<Out> pending[2];
  for (Pending<Out>& nothing : pending) nothing.features = features;
  int64_t height = 0, turn = 0;
  const auto finish = [&](Pending<Out>& last) {
    Epilogue<2, Out>(last.out, last.rows, *last.features, last.c, last.acc)(last.begin, last.end);
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
    FeatureParameters& f = features[item % 2];
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

void run_amx(const Linear& q, int64_t begin, int64_t end) {
  if (!q.gelu_codes && q.y_type == Float::bf16 && q.normal) {
    return tile_blocks(q, NormalBFloat16Output{{static_cast<uint16_t*>(q.y), q.weight.features}}, begin, end);
  }
  with_output(q, [&](const auto& y) { tile_blocks(q, y, begin, end); });
}

}  // namespace ptq4vm::PTQ4VM_SET

#endif
