// fused.conv2d_quantize in float32: u differs from that in float64 by about 1e-6 of the largest. Channels lie in lanes.
// A column of inputs is loaded once: it adds to the outputs of all columns that the kernel reaches from it, whose sums
// stay in registers. Sums have one order, whatever the division of work.
#include <algorithm>
#include <vector>

#include "quantize.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

// Some rows of a map, with the memory that they need.
template <class T>
class Rows {
 public:
  explicit Rows(const Conv2d& conv)
      : c(conv), vectors((c.channels + WIDTH - 1) / WIDTH), weights(vectors * c.rows * c.columns),
        inv_smooth(vectors * c.directions), inputs(c.rows),
        grids(c.directions * c.width, Grid(1.0f, 0, 0, 0)) {
    const int64_t size = c.rows * c.columns;
    for (int64_t v = 0; v < vectors; v++) {
      const int64_t e = v * WIDTH, count = std::min(WIDTH, c.channels - e);
      for (int64_t k = 0; k < size; k++) {
        float lanes[WIDTH] = {};
        for (int64_t i = 0; i < count; i++) lanes[i] = c.weight[(e + i) * size + k];
        weights[v * size + k] = load_as<f32xw>(lanes);
      }
      for (int64_t k = 0; k < c.directions; k++) {
        const float* smooth = c.qparams.inv_smooth;
        inv_smooth[v * c.directions + k] = smooth ? load_lanes(smooth + k * c.channels + e, count) : fill(1.0f);
      }
    }
  }

  void run(int64_t image, int64_t h) {
    for (int64_t k = 0; k < c.directions; k++) {
      for (int64_t w = 0; w < c.width; w++) grids[k * c.width + w] = Grid(c.qparams, h * c.width + w, k);
    }
    for (int64_t i = 0; i < c.rows; i++) {
      const int64_t from = h + i - c.rows / 2;
      const T* x = static_cast<const T*>(c.x) + image * c.x_image;
      inputs[i] = 0 <= from && from < c.height ? x + from * c.width * c.x_row : nullptr;
    }
    const int64_t token = (image * c.height + h) * c.width;
    for (int64_t v = 0; v < vectors; v++) c.rows == 3 && c.columns == 3 ? three(v, token) : any(v, token);
  }

 private:
  f32xw input(int64_t i, int64_t w, int64_t e) const {
    return inputs[i] ? load_lanes(inputs[i] + w * c.x_row + e, c.channels - e) : f32xw{};
  }

  void finish(f32xw sum, int64_t v, int64_t token, int64_t w) {
    const int64_t e = v * WIDTH, left = c.channels - e, at = (token + w) * c.channels + e;
    const f32xw u = silu(sum);
    store_lanes(static_cast<T*>(c.y) + at, u, left);
    for (int64_t k = 0; k < c.directions; k++) {
      int8_t* codes = c.codes + k * c.batch * c.height * c.width * c.channels + at;
      store_codes(codes, u * inv_smooth[v * c.directions + k], grids[k * c.width + w], left);
    }
  }

  void three(int64_t v, int64_t token) {
    const int64_t e = v * WIDTH;
    const f32xw bias = c.bias ? load_lanes(c.bias + e, c.channels - e) : f32xw{};
    f32xw k[9];
    std::copy_n(&weights[9 * v], 9, k);
    f32xw before = bias, here = bias;
    for (int64_t w = 0; w < c.width; w++) {
      f32xw after = bias;
      for (int i = 0; i < 3; i++) {
        const f32xw x = input(i, w, e);
        before += k[3 * i + 2] * x;
        here += k[3 * i + 1] * x;
        after += k[3 * i] * x;
      }
      if (w) finish(before, v, token, w - 1);
      before = here, here = after;
    }
    finish(before, v, token, c.width - 1);
  }

  void any(int64_t v, int64_t token) {
    const int64_t e = v * WIDTH;
    for (int64_t w = 0; w < c.width; w++) {
      f32xw sum = c.bias ? load_lanes(c.bias + e, c.channels - e) : f32xw{};
      for (int64_t i = 0; i < c.rows; i++) {
        for (int64_t j = 0; j < c.columns; j++) {
          const int64_t from = w + j - c.columns / 2;
          if (0 <= from && from < c.width) sum += weights[(v * c.rows + i) * c.columns + j] * input(i, from, e);
        }
      }
      finish(sum, v, token, w);
    }
  }

  const Conv2d& c;
  const int64_t vectors;
  std::vector<f32xw> weights;     // (vectors, rows, columns)
  std::vector<f32xw> inv_smooth;  // (vectors, directions)
  std::vector<const T*> inputs;   // rows of the map that the kernel covers, null outside
  std::vector<Grid> grids;        // (directions, width)
};

template <class T>
void run(const Conv2d& c, int64_t begin, int64_t end) {
  Rows<T> rows(c);
  for (int64_t i = begin; i < end; i++) rows.run(i / c.height, i % c.height);
}

}  // namespace

void conv2d(const Conv2d& c, int64_t begin, int64_t end) {
  c.type == Float::f32 ? run<float>(c, begin, end) : run<bfloat16>(c, begin, end);
}

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
