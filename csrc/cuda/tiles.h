// The tile that a linear is cut into.
#pragma once

#include <cstdint>

namespace ptq4vm::cuda {

enum class Tile { rows64_features64, rows64_features128, rows128_features128 };

// The sizes from which on a tile is used; outputs are those of all directions.
struct TileRule {
  int64_t features, outputs;
  Tile tile;
};

// The first line whose sizes a problem reaches. Large tiles read less memory, many small ones keep every multiprocessor
// busy; few output channels take one tile across, so that x is read once.
constexpr TileRule TILES[] = {
    {129, 1 << 22, Tile::rows128_features128},
    {65, 1 << 18, Tile::rows64_features128},
    {0, 0, Tile::rows64_features64},
};

// The rules of linear_s8_sm90: two tiles are in work on every multiprocessor, and a tile of fewer features would not
// read less.
constexpr TileRule TILES_SM90[] = {
    {65, 1 << 22, Tile::rows128_features128},
    {0, 0, Tile::rows64_features128},
};

// The last line is for every problem.
template <int RULES>
constexpr Tile choose_tile(const TileRule (&rules)[RULES], int64_t directions, int64_t rows, int64_t features) {
  for (const TileRule& rule : rules) {
    if (features >= rule.features && directions * rows * features >= rule.outputs) return rule.tile;
  }
  return rules[RULES - 1].tile;
}

}  // namespace ptq4vm::cuda
