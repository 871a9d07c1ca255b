// ops.selective_scan: a thread has a channel of an image and all its states; B and C of a chunk of tokens lie in
// shared memory. Any strides between rows; u, delta, B, C and z in any type.
#include "scan.cuh"

namespace ptq4vm::cuda {
namespace {

constexpr int LANES = 64;  // channels of a block

template <int N>
__global__ void __launch_bounds__(LANES) scan_kernel(Scan s) {
  PTQ4VM_DYNAMIC_SHARED(float, coefficients);  // (STRIP, 2 states), and states
  const int64_t panels = ceil_div<int64_t>(s.channels, LANES);
  const int64_t image = blockIdx.x / panels, e = blockIdx.x % panels * LANES + threadIdx.x;
  const int64_t channel = min(e, s.channels - 1);  // threads without one take the last, and write nothing
  const int count = static_cast<int>(s.states);
  const float bias = s.delta_bias ? s.delta_bias[channel] : 0.0f, skip = s.D ? s.D[channel] : 0.0f;
  States<N> states(s.A + channel * s.states, s.states, coefficients + STRIP * 2 * count);

  for (int64_t begin = 0; begin < s.tokens; begin += STRIP) {
    __syncthreads();
    for (int i = threadIdx.x; i < STRIP * 2 * count; i += LANES) {
      const int64_t token = begin + i / (2 * count);
      const int n = i % (2 * count);
      if (token < s.tokens)
        coefficients[i] = n < count ? read(s.B, image, token, n) : read(s.C, image, token, n - count);
    }
    __syncthreads();
    float raw[STRIP], u[STRIP];
#pragma unroll
    for (int t = 0; t < STRIP; t++) {
      const bool inside = begin + t < s.tokens;
      raw[t] = inside ? read(s.delta, image, begin + t, channel) : 0.0f;
      u[t] = inside ? read(s.u, image, begin + t, channel) : 0.0f;
    }
#pragma unroll
    for (int t = 0; t < STRIP; t++) {
      if (begin + t >= s.tokens) break;
      const float dt = s.softplus ? softplus(raw[t] + bias) : raw[t] + bias;
      float y = skip * u[t] + states.advance(dt, dt * u[t], coefficients + t * 2 * count);
      if (s.z.data) y *= silu(read(s.z, image, begin + t, channel));
      if (e < s.channels) write(s.y, s.y_type, ((image * s.tokens) + begin + t) * s.channels + e, y);
    }
  }
}

template <int N>
void launch(const Scan& s, Stream stream) {
  const size_t words = STRIP * 2 * s.states + States<N>::words(s.states, LANES);
  const auto blocks = static_cast<unsigned>(s.batch * ceil_div<int64_t>(s.channels, LANES));
  PTQ4VM_LAUNCH(scan_kernel<N>, blocks, LANES, words * sizeof(float), stream, s);
}

}  // namespace

void run(const Scan& s, Stream stream) {
  if (s.states == 1) return launch<1>(s, stream);
  if (s.states == 16) return launch<16>(s, stream);
  launch<0>(s, stream);
}

}  // namespace ptq4vm::cuda
