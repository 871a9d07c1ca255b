// Packed weights, and rows of codes, as the products of a linear take them.
//
// Weights come in tiles: 64 input channels of 16 output channels, the operand of AMX and of VNNI as it lies in memory.
#pragma once

#include <vector>

#include "kernels.h"
#include "vec.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

constexpr int64_t TILE = 16;  // rows, or output channels
constexpr int64_t TILE_CODES = TILE * K_TILE;

// Memory that a thread keeps from one item of its work to the next.
struct Scratch {
  std::vector<uint8_t> memory;
  template <class T>
  T* take(size_t count) {  // 64-byte aligned; what it held before is gone
    if (memory.size() < count * sizeof(T) + 64) memory.resize(count * sizeof(T) + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  }
};

thread_local Scratch nibble_memory, weight_memory;

#ifdef __AVX512VNNI__
using Code = int8_t;  // four channels in a lane
#else
using Code = int16_t;  // two channels in a lane: the first and third of four, then the second and fourth
#endif
constexpr int64_t PER_LANE = 4 / static_cast<int64_t>(sizeof(Code));
constexpr int64_t VECTOR = LANES * PER_LANE;

typedef int16_t i16x32 __attribute__((vector_size(64)));

// int8 pairs → the int16 of their even places, then those of the odd ones.
inline void widen(int16_t* to, const int8_t* from, int64_t tiles) {
  for (int64_t i = 0; i < tiles * TILE_CODES; i += K_TILE) {
    const auto pairs = load_as<i16x32>(from + i);
    const i16x32 even = (pairs << 8) >> 8, odd = pairs >> 8;
    std::memcpy(to + i, &even, sizeof(even));
    std::memcpy(to + i + K_TILE / 2, &odd, sizeof(odd));
  }
}

// Groups [begin, end) of 16 output channels; valid until the next call in this thread.
inline const Code* read_weight(const PackedWeight& w, int64_t begin, int64_t end) {
  const int64_t k_tiles = divided_up(w.channels, K_TILE), tiles = (end - begin) * k_tiles;
  const auto* from = static_cast<const int8_t*>(w.tiles) + begin * k_tiles * (w.nibbles ? TILE_CODES / 2 : TILE_CODES);
  if (w.nibbles) {
    auto* unpacked = nibble_memory.take<int8_t>(tiles * TILE_CODES);
    const auto* bytes = reinterpret_cast<const uint8_t*>(from);
    for (int64_t i = 0; i < tiles * TILE_CODES; i += K_TILE) unpack_nibbles(unpacked + i, bytes + i / 2);
    from = unpacked;
  }
#ifdef __AVX512VNNI__
  return from;
#else
  auto* codes = weight_memory.take<Code>(tiles * TILE_CODES);
  widen(codes, from, tiles);
  return codes;
#endif
}

// Rows as dot products take them.
#ifdef __AVX512VNNI__
constexpr int OFFSET = 128;  // that is added: dpbusd multiplies unsigned by signed
inline void convert_rows(Code* to, const int8_t* x, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = static_cast<int8_t>(x[i] ^ -128);
}
#else
constexpr int OFFSET = 0;
inline void convert_rows(Code* to, const int8_t* x, int64_t count) {
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

}  // namespace
}  // namespace ptq4vm::PTQ4VM_SET
