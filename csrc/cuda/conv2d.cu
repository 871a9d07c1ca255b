// ops.conv2d_quantize. A thread has V channels of STRIP neighbours in a row of a map. Sums have one order, in
// float32. Rows of x may lie anywhere; V is 4 where they are aligned.
#include "device.cuh"

namespace ptq4vm::cuda {
namespace {

constexpr int STRIP = 4, STRIPS = 4;  // STRIPS of them in a block

// SIDE is that of a square kernel, or 0 where it is another: then inputs are read again for every tap.
template <class T, int V, int SIDE>
__global__ void __launch_bounds__(WARP_SIZE* STRIPS) conv2d_kernel(Conv2d c) {
  const int64_t panels = ceil_div<int64_t>(c.channels, WARP_SIZE * V), strips = ceil_div<int64_t>(c.width, STRIP);
  const int64_t item = blockIdx.x / panels * STRIPS + threadIdx.y, row = item / strips;  // of all images' rows
  const int64_t e = (blockIdx.x % panels * WARP_SIZE + threadIdx.x) * V;
  if (e >= c.channels || row >= c.batch * c.height) return;

  const int64_t image = row / c.height, h = row % c.height, first = item % strips * STRIP;
  const int rows = SIDE ? SIDE : static_cast<int>(c.rows), columns = SIDE ? SIDE : static_cast<int>(c.columns);
  const T* x = static_cast<const T*>(c.x.data) + image * c.x.image + e;
  const float* weight = c.weight + e * rows * columns;

  float y[STRIP][V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    const float bias = c.bias ? c.bias[e + v] : 0.0f;
#pragma unroll
    for (int t = 0; t < STRIP; t++) y[t][v] = bias;
  }
#pragma unroll(SIDE ? SIDE : 1)
  for (int i = 0; i < rows; i++) {
    const int64_t from = h + i - rows / 2;
    if (from < 0 || from >= c.height) continue;
    const auto input = [&](int64_t w, float(&value)[V]) {
      if (0 <= w && w < c.width) {
        load<V>(x + (from * c.width + w) * c.x.row, value);
      } else {
#pragma unroll
        for (int v = 0; v < V; v++) value[v] = 0.0f;
      }
    };
    if constexpr (SIDE > 0) {
      float values[STRIP + SIDE - 1][V];
#pragma unroll
      for (int t = 0; t < STRIP + SIDE - 1; t++) input(first + t - SIDE / 2, values[t]);
#pragma unroll
      for (int j = 0; j < SIDE; j++) {
#pragma unroll
        for (int v = 0; v < V; v++) {
          const float w = weight[(v * SIDE + i) * SIDE + j];
#pragma unroll
          for (int t = 0; t < STRIP; t++) y[t][v] += w * values[t + j][v];
        }
      }
    } else {
      for (int j = 0; j < columns; j++) {
#pragma unroll
        for (int t = 0; t < STRIP; t++) {
          float value[V];
          input(first + t + j - columns / 2, value);
#pragma unroll
          for (int v = 0; v < V; v++) y[t][v] += weight[(v * rows + i) * columns + j] * value[v];
        }
      }
    }
  }

  const int64_t tokens = c.height * c.width, token = h * c.width + first;
  const int64_t at = (image * tokens + token) * c.channels + e;
#pragma unroll
  for (int t = 0; t < STRIP; t++) {
    if (first + t >= c.width) break;
#pragma unroll
    for (int v = 0; v < V; v++) y[t][v] = silu(y[t][v]);
    store<V>(static_cast<T*>(c.y) + at + t * c.channels, y[t]);
  }
  for (int64_t k = 0; k < c.directions; k++) {
    float inv_smooth[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
      inv_smooth[v] = c.qparams.inv_smooth ? c.qparams.inv_smooth[k * c.channels + e + v] : 1.0f;
    }
    int8_t* to = c.codes + k * c.batch * tokens * c.channels + at;
#pragma unroll
    for (int t = 0; t < STRIP; t++) {
      if (first + t >= c.width) break;
      const RowQParams qparams(c.qparams, token + t, k);
      int codes[V];
#pragma unroll
      for (int v = 0; v < V; v++) codes[v] = qparams.code(__fmul_rn(y[t][v], inv_smooth[v]));
      store_codes<V>(to + t * c.channels, codes);
    }
  }
}

template <class T, int V, int SIDE>
void launch(const Conv2d& c, Stream stream) {
  const int64_t strips = c.batch * c.height * ceil_div<int64_t>(c.width, STRIP);
  const int64_t panels = ceil_div<int64_t>(c.channels, WARP_SIZE * V);
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(strips, STRIPS) * panels);
  PTQ4VM_LAUNCH(conv2d_kernel<T, V, SIDE>, blocks, dim3(WARP_SIZE, STRIPS), 0, stream, c);
}

}  // namespace

void run(const Conv2d& c, Stream stream) {
  with_type(c.x.type, [&](auto t) {
    using T = decltype(t);
    constexpr int V = 4;
    const bool whole = (c.channels | c.x.row | c.x.image) % V == 0 && aligned<V>(static_cast<const T*>(c.x.data)) &&
                       aligned<V>(static_cast<T*>(c.y)) && aligned<V>(c.codes);
    const bool three = c.rows == 3 && c.columns == 3;
    if (whole) return three ? launch<T, V, 3>(c, stream) : launch<T, V, 0>(c, stream);
    three ? launch<T, 1, 3>(c, stream) : launch<T, 1, 0>(c, stream);
  });
}

}  // namespace ptq4vm::cuda
