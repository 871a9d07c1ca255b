// ops.conv1d_quantize and ops.causal_conv1d. A thread has V channels and STRIP positions of a direction: it
// reads all that they need before it writes. Sums have one order, in float32. Rows may lie anywhere; V is 4 where they
// are aligned.
#include "device.cuh"

namespace ptq4vm::cuda {
namespace {

constexpr int STRIP = 8, STRIPS = 4;  // STRIPS of them in a block

// TAPS is their number, or 0 where it is not known: then inputs are read again for every tap.
template <class T, int V, int TAPS>
__global__ void __launch_bounds__(WARP_SIZE* STRIPS) conv_kernel(Conv c) {
  const int64_t panels = ceil_div<int64_t>(c.channels, WARP_SIZE * V);
  const int64_t chunks = ceil_div<int64_t>(c.tokens, STRIP * STRIPS);
  const int64_t chunk = blockIdx.x / panels % chunks, item = blockIdx.x / panels / chunks;
  const int64_t direction = item / c.batch, image = item % c.batch;
  const int64_t e = (blockIdx.x % panels * WARP_SIZE + threadIdx.x) * V;
  const int64_t first = (chunk * STRIPS + threadIdx.y) * STRIP;
  if (e >= c.channels || first >= c.tokens) return;

  const int taps = TAPS ? TAPS : static_cast<int>(c.taps);
  const T* x = static_cast<const T*>(c.x.data) + image * c.x.image + e;
  const int32_t* order = c.order ? c.order + direction * c.tokens : nullptr;
  const float* weight = c.weight + (direction * c.channels + e) * taps;
  const auto token_of = [&](int64_t position) {
    return order ? checked_token(order[position], 0, c.tokens) : position;
  };
  const auto input = [&](int64_t position, float(&value)[V]) {
    if (0 <= position && position < c.tokens) {
      load<V>(x + token_of(position) * c.x.row, value);
    } else {
#pragma unroll
      for (int v = 0; v < V; v++) value[v] = 0.0f;
    }
  };

  float y[STRIP][V], inv_smooth[V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    const float bias = c.bias ? c.bias[direction * c.channels + e + v] : 0.0f;
    inv_smooth[v] = c.qparams.inv_smooth ? c.qparams.inv_smooth[direction * c.channels + e + v] : 1.0f;
#pragma unroll
    for (int t = 0; t < STRIP; t++) y[t][v] = bias;
  }
  if constexpr (TAPS > 0) {
    float w[V][TAPS], values[STRIP + TAPS - 1][V];
#pragma unroll
    for (int v = 0; v < V; v++) load<TAPS>(weight + v * TAPS, w[v]);
#pragma unroll
    for (int t = 0; t < STRIP + TAPS - 1; t++) input(first + t - (TAPS - 1), values[t]);
#pragma unroll
    for (int t = 0; t < STRIP; t++) {
#pragma unroll
      for (int k = 0; k < TAPS; k++) {
#pragma unroll
        for (int v = 0; v < V; v++) y[t][v] += w[v][k] * values[t + k][v];
      }
    }
  } else {
    for (int k = 0; k < taps; k++) {
#pragma unroll
      for (int t = 0; t < STRIP; t++) {
        float value[V];
        input(first + t - (taps - 1) + k, value);
#pragma unroll
        for (int v = 0; v < V; v++) y[t][v] += weight[v * taps + k] * value[v];
      }
    }
  }

#pragma unroll
  for (int t = 0; t < STRIP; t++) {
    if (first + t >= c.tokens) break;
    const int64_t token = token_of(first + t), at = (item * c.tokens + token) * c.channels + e;
#pragma unroll
    for (int v = 0; v < V; v++) y[t][v] = c.silu ? silu(y[t][v]) : y[t][v];
    store<V>(static_cast<T*>(c.y) + at, y[t]);
    if (c.codes) {
      const RowQParams qparams(c.qparams, token, direction);
      int codes[V];
#pragma unroll
      for (int v = 0; v < V; v++) codes[v] = qparams.code(__fmul_rn(y[t][v], inv_smooth[v]));
      store_codes<V>(c.codes + at, codes);
    }
  }
}

template <class T, int V, int TAPS>
void launch(const Conv& c, Stream stream) {
  const int64_t panels = ceil_div<int64_t>(c.channels, WARP_SIZE * V);
  const int64_t chunks = ceil_div<int64_t>(c.tokens, STRIP * STRIPS);
  const auto blocks = static_cast<unsigned>(c.directions * c.batch * chunks * panels);
  PTQ4VM_LAUNCH(conv_kernel<T, V, TAPS>, blocks, dim3(WARP_SIZE, STRIPS), 0, stream, c);
}

}  // namespace

void run(const Conv& c, Stream stream) {
  with_type(c.x.type, [&](auto t) {
    using T = decltype(t);
    constexpr int V = 4;
    const bool whole = (c.channels | c.x.row | c.x.image) % V == 0 && aligned<V>(static_cast<const T*>(c.x.data)) &&
                       aligned<V>(static_cast<T*>(c.y)) && aligned<V>(c.codes);
    const bool four = c.taps == 4 && aligned<4>(c.weight);
    if (whole) return four ? launch<T, V, 4>(c, stream) : launch<T, V, 0>(c, stream);
    four ? launch<T, 1, 4>(c, stream) : launch<T, 1, 0>(c, stream);
  });
}

}  // namespace ptq4vm::cuda
