// ops.conv2d_quantize in float32: u differs from that in float64 by about 1e-6 of the largest. Channels lie in lanes.
// A column of inputs is loaded once: it adds to the outputs of all columns that the kernel reaches from it, whose sums
// stay in registers. Sums have one order, whatever the division of work.
#include <algorithm>
#include <vector>

#include "quantize.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

// A row of a map.
template <class T>
struct MapRow {
  const T* const* inputs;  // the rows that the kernel covers, null outside of the map
  T* y;
  int8_t* codes;                               // of the first direction
  const RowQParams* qparams;                   // (directions, width)
  const f32xw *weights, *biases, *inv_smooth;  // (vectors, rows · columns), (vectors,), (vectors, directions)
  int64_t x_row, channels, width, directions, map, rows, columns;  // map: codes of a direction
};

// One output of a vector of channels.
template <class T>
inline void finish(const MapRow<T>& r, f32xw sum, int64_t v, int64_t w, int64_t left) {
  const int64_t at = w * r.channels + v * WIDTH;
  const f32xw u = silu(sum);
  store_lanes(r.y + at, u, left);
  for (int64_t k = 0; k < r.directions; k++) {
    store_codes(r.codes + k * r.map + at, u * r.inv_smooth[v * r.directions + k], r.qparams[k * r.width + w], left);
  }
}

// Vectors [first, last); `count` channels of each, all of a vector if WHOLE. A function of its own, without calls: then
// there are enough registers.
template <bool WHOLE, class T>
__attribute__((noinline)) void three_by_three(const MapRow<T>& row, int64_t first, int64_t last, int64_t count) {
  const MapRow<T> r = row;  // codes could be anywhere, for all that the compiler knows
  const T *above = r.inputs[0], *middle = r.inputs[1], *below = r.inputs[2];
  const int64_t left = WHOLE ? WIDTH : count;
  for (int64_t v = first; v < last; v++) {
    f32xw k[9];
    for (int i = 0; i < 9; i++) k[i] = r.weights[9 * v + i];
    f32xw before = r.biases[v], here = before;
    for (int64_t w = 0; w < r.width; w++) {
      const int64_t at = w * r.x_row + v * WIDTH;
      f32xw after = r.biases[v];
      const auto add = [&](const T* x, int i) {
        const f32xw value = load_lanes(x + at, left);
        before += k[i + 2] * value;
        here += k[i + 1] * value;
        after += k[i] * value;
      };
      if (above) add(above, 0);
      add(middle, 3);
      if (below) add(below, 6);
      if (w) finish(r, before, v, w - 1, left);
      before = here, here = after;
    }
    finish(r, before, v, r.width - 1, left);
  }
}

template <class T>
void any_size(const MapRow<T>& r, int64_t v) {
  const int64_t left = r.channels - v * WIDTH;
  for (int64_t w = 0; w < r.width; w++) {
    f32xw sum = r.biases[v];
    for (int64_t i = 0; i < r.rows; i++) {
      for (int64_t j = 0; r.inputs[i] && j < r.columns; j++) {
        const int64_t from = w + j - r.columns / 2;
        if (from < 0 || from >= r.width) continue;
        sum += r.weights[(v * r.rows + i) * r.columns + j] * load_lanes(r.inputs[i] + from * r.x_row + v * WIDTH, left);
      }
    }
    finish(r, sum, v, w, left);
  }
}

template <class T>
void rows_of_maps(const Conv2d& c, int64_t begin, int64_t end) {
  const int64_t E = c.channels, K = c.directions, size = c.rows * c.columns, vectors = vectors_of(E);
  std::vector<f32xw> weights(vectors * size), biases(vectors), inv_smooth(vectors * K);
  for (int64_t e = 0, v = 0; e < E; e += WIDTH, v++) {
    load_columns(c.weight + e * size, size, E - e, &weights[v * size]);
    if (c.bias) biases[v] = load_lanes(c.bias + e, E - e);
    for (int64_t k = 0; k < K; k++) {
      const float* smooth = c.qparams.inv_smooth;
      inv_smooth[v * K + k] = smooth ? load_lanes(smooth + k * E + e, E - e) : fill(1.0f);
    }
  }
  std::vector<const T*> inputs(c.rows);
  std::vector<RowQParams> qparams(K * c.width, RowQParams(1.0f, 0, 0, 0));
  for (int64_t row = begin; row < end; row++) {
    const int64_t h = row % c.height;
    const T* x = static_cast<const T*>(c.x.data) + row / c.height * c.x.image;
    for (int64_t i = 0; i < c.rows; i++) {
      const int64_t from = h + i - c.rows / 2;
      inputs[i] = 0 <= from && from < c.height ? x + from * c.width * c.x.row : nullptr;
    }
    for (int64_t k = 0; k < K; k++) {
      for (int64_t w = 0; w < c.width; w++) qparams[k * c.width + w] = RowQParams(c.qparams, h * c.width + w, k);
    }
    const int64_t at = row * c.width * E;
    const int64_t map = c.batch * c.height * c.width * E;
    const MapRow<T> r{.inputs = inputs.data(),
                      .y = static_cast<T*>(c.y) + at,
                      .codes = c.codes + at,
                      .qparams = qparams.data(),
                      .weights = weights.data(),
                      .biases = biases.data(),
                      .inv_smooth = inv_smooth.data(),
                      .x_row = c.x.row,
                      .channels = E,
                      .width = c.width,
                      .directions = K,
                      .map = map,
                      .rows = c.rows,
                      .columns = c.columns};
    if (c.rows == 3 && c.columns == 3) {
      three_by_three<true>(r, 0, E / WIDTH, WIDTH);
      if (E % WIDTH) three_by_three<false>(r, E / WIDTH, vectors, E % WIDTH);
    } else {
      for (int64_t v = 0; v < vectors; v++) any_size(r, v);
    }
  }
}

}  // namespace

void run(const Conv2d& c, int64_t begin, int64_t end) {
  with_type(c.x.type, [&](auto t) { rows_of_maps<decltype(t)>(c, begin, end); });
}

}  // namespace ptq4vm::PTQ4VM_SET
