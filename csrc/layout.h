// The layout of packed weights, and the panels that work on channels is cut into.
#pragma once

#include <cstdint>

namespace ptq4vm {

constexpr int64_t LANES = 16;   // output channels of a packed weight's tile
constexpr int64_t K_TILE = 64;  // channels of a packed weight's tile
constexpr int64_t PANEL = 256;  // channels of the panel whose gradients a scan sums

constexpr int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

constexpr int64_t round_up(int64_t value, int64_t to) { return divided_up(value, to) * to; }

constexpr int64_t groups(int64_t channels) { return divided_up(channels, LANES); }

}  // namespace ptq4vm
