// Shared by the scans: the recurrence of one channel, and the chunks of tokens that a directional scan has in shared
// memory. All in float32; results differ from those in float64 by about 1e-6 of the largest.
#pragma once

#include "device.cuh"

namespace ptq4vm::cuda {

constexpr float LOG2_E = 1.442695041f;

// Within 2 units in the last place.
__device__ inline float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// log(1 + x) for 0 <= x <= 1, relative to x: dt is small, and so must be their errors.
__device__ inline float log1p_of_fraction(float x) {
  float p = x * 5.23269411e-3f - 2.950523728e-2f;
  p = p * x + 7.822594782e-2f;
  p = p * x - 1.36632453e-1f;
  p = p * x + 1.910600644e-1f;
  p = p * x - 2.484298211e-1f;
  p = p * x + 3.331909679e-1f;
  p = p * x - 4.999949314e-1f;
  p = p * x + 9.999999699e-1f;
  return p * x;
}

__device__ inline float softplus(float x) { return fmaxf(x, 0.0f) + log1p_of_fraction(fast_exp2(-fabsf(x) * LOG2_E)); }

// 2^x, which multiplies states. Where it is close to one its distance from one counts: an error there adds up over
// thousands of tokens.
struct Decay {
  float factor, less_one;
  bool slow;

  __device__ explicit Decay(float x) : factor(fast_exp2(x)), slow(-0.5f <= x && x <= 0.0f) {
    float slope = x * 8.384758323e-3f + 5.512808407e-2f;
    slope = slope * x + 2.401892734e-1f;
    slope = slope * x + 6.931465999e-1f;
    less_one = x * slope;
  }

  __device__ float operator()(float h, float input) const {
    return slow ? fmaf(h, less_one, h + input) : fmaf(h, factor, input);
  }
};

// The states of a channel in registers. `coefficients` is B and then C of a token, in shared memory.
template <int N>
struct States {
  float h[N], rate[N];

  static size_t words(int64_t, int) { return 0; }

  __device__ States(const float* A, int64_t, float*) {
#pragma unroll
    for (int n = 0; n < N; n++) h[n] = 0.0f, rate[n] = A[n] * LOG2_E;
  }

  __device__ float advance(float dt, float dt_u, const float* coefficients) {
    float B[N], C[N], y[2] = {};
    load<N>(coefficients, B);
    load<N>(coefficients + N, C);
#pragma unroll
    for (int n = 0; n < N; n++) {
      // The fast one: with this many states, exponentials bound the whole scan.
      h[n] = fmaf(h[n], fast_exp2(dt * rate[n]), dt_u * B[n]);
      y[n % 2] += h[n] * C[n];
    }
    return y[0] + y[1];
  }
};

template <>
struct States<1> {
  float h = 0.0f, rate;

  static size_t words(int64_t, int) { return 0; }

  __device__ States(const float* A, int64_t, float*) : rate(*A * LOG2_E) {}

  __device__ float advance(float dt, float dt_u, const float* coefficients) {
    h = Decay(dt * rate)(h, dt_u * coefficients[0]);
    return h * coefficients[1];
  }
};

// Any number of them, in shared memory.
template <>
struct States<0> {
  const float* A;
  int64_t count, stride;
  float* h;

  static size_t words(int64_t states, int threads) { return states * threads; }

  __device__ States(const float* rates, int64_t states, float* memory)
      : A(rates), count(states), stride(blockDim.x * blockDim.y), h(memory + threadIdx.y * blockDim.x + threadIdx.x) {
    for (int64_t n = 0; n < count; n++) h[n * stride] = 0.0f;
  }

  __device__ float advance(float dt, float dt_u, const float* coefficients) {
    float y = 0.0f;
    for (int64_t n = 0; n < count; n++) {
      const float next = Decay(dt * (A[n] * LOG2_E))(h[n * stride], dt_u * coefficients[n]);
      h[n * stride] = next;
      y += next * coefficients[count + n];
    }
    return y;
  }
};

__device__ inline float read(const void* data, Float type, int64_t at) {
  if (type == Float::f32) return static_cast<const float*>(data)[at];
  if (type == Float::bf16) return to_float(static_cast<const bfloat16*>(data)[at]);
  return to_float(static_cast<const float16*>(data)[at]);
}

__device__ inline float read(const Rows& x, int64_t image, int64_t token, int64_t channel) {
  return read(x.data, x.type, image * x.image + token * x.row + channel);
}

__device__ inline void write(void* data, Float type, int64_t at, float value) {
  if (type == Float::f32) static_cast<float*>(data)[at] = value;
  if (type == Float::bf16) static_cast<bfloat16*>(data)[at] = from_float<bfloat16>(value);
  if (type == Float::f16) static_cast<float16*>(data)[at] = from_float<float16>(value);
}

constexpr int STRIP = 8;  // tokens that a thread takes at once

// All that channels read of CHUNK positions of a direction, in shared memory. A position without a token is one of
// zeros. N is the number of states, or 0 where it is not known.
template <int CHUNK, int N>
struct TokenChunk {
  float* coefficients;  // (CHUNK, 2 states): B and C
  float* scale;         // (CHUNK,)
  int* zero_point;      // (CHUNK,)
  int* codes;           // (rank / 4, CHUNK): four codes each

  static __host__ __device__ int quads(const DirectionalScan& s) { return static_cast<int>((s.rank + 3) / 4); }

  static __host__ __device__ int coefficient_count(const DirectionalScan& s) {
    return 2 * (N ? N : static_cast<int>(s.states));
  }

  static __host__ __device__ int words(const DirectionalScan& s) {
    return CHUNK * (coefficient_count(s) + 2 + quads(s));
  }

  __device__ TokenChunk(const DirectionalScan& s, float* memory)
      : coefficients(memory), scale(coefficients + CHUNK * coefficient_count(s)),
        zero_point(reinterpret_cast<int*>(scale) + CHUNK), codes(zero_point + CHUNK) {}

  // Fills the positions from `begin` on, by `threads` threads of which this is one.
  __device__ void fill(const DirectionalScan& s, int64_t direction, int64_t image, int64_t begin, int thread,
                       int threads) const {
    const int32_t* order = s.order + direction * s.length;
    const int coefficient_count = TokenChunk::coefficient_count(s), count = quads(s), rank = static_cast<int>(s.rank),
              width = rank + coefficient_count;
    const float* projected = s.projected + (direction * s.batch + image) * s.tokens * width;
    const auto token_of = [&](int t) {
      return begin + t < s.length ? checked_token(order[begin + t], -1, s.tokens) : -1;
    };

#pragma unroll 4
    for (int i = thread; i < CHUNK * coefficient_count; i += threads) {
      const int at = token_of(i / coefficient_count);
      coefficients[i] = at < 0 ? 0.0f : projected[static_cast<int64_t>(at) * width + rank + i % coefficient_count];
    }
#pragma unroll 1
    for (int t = thread; t < CHUNK; t += threads) {
      const int at = token_of(t);
      const int64_t place = direction * s.dt_qparams.scales + remainder(max(at, 0), s.dt_qparams.scales);
      scale[t] = at < 0 ? 0.0f : s.dt_scale[place];
      zero_point[t] = at < 0 ? 0 : s.dt_qparams.zero_point[place];
    }
#pragma unroll 1
    for (int i = thread; i < CHUNK * count; i += threads) {
      const int t = i / count, quad = i % count, at = token_of(t);
      unsigned four = 0;
      if (at >= 0) {
        const RowQParams qparams(s.dt_qparams, at, direction);
        for (int j = 0; j < 4; j++) {
          const int r = 4 * quad + j;
          if (r >= rank) continue;
          float value = projected[static_cast<int64_t>(at) * width + r];
          if (s.dt_qparams.inv_smooth) value = __fmul_rn(value, s.dt_qparams.inv_smooth[direction * rank + r]);
          four |= static_cast<unsigned>(qparams.code(value) & 255) << 8 * j;
        }
      }
      codes[quad * CHUNK + t] = static_cast<int>(four);
    }
  }
};

// The parameters of a direction for a channel.
struct Channel {
  float bias, skip, weight_scale;
  int weight_sum, quads;
  const unsigned* weight;  // four codes of quad q at q · stride
  int stride, shift;       // of packed ones, by how much the nibbles are shifted
  bool packed;

  __device__ Channel(const DirectionalScan& s, int64_t direction, int64_t channel)
      : quads(static_cast<int>(s.rank + 3) / 4), packed(s.packed) {
    const int64_t at = direction * s.channels + channel;
    bias = s.dt_bias[at], skip = s.D ? s.D[at] : 0.0f;
    weight_scale = s.dt_weight_scale[at], weight_sum = s.dt_weight_sum[at];
    // Tiles (channels / 16, rank / 64, 16, 16) of four codes; packed ones share 8 words, the last 8 the high nibbles.
    const int64_t tile = direction * ceil_div<int64_t>(s.channels, 16) + channel / 16;
    const int64_t row = tile * ceil_div<int64_t>(s.rank, 64) * 16;
    const int lane = static_cast<int>(channel % 16);
    stride = packed ? 8 : 16, shift = lane < 8 ? 0 : 4;
    weight = static_cast<const unsigned*>(s.dt_weight) + row * stride + lane % stride;
  }

  __device__ int four_weights(int quad) const {
    unsigned codes = weight[quad * stride];
    if (packed) {
      codes = codes >> shift & 0x0f0f0f0fu;
      codes |= (codes & 0x08080808u) * 0x1e;  // the sign, to the upper half
    }
    return static_cast<int>(codes);
  }

  // dt of STRIP positions: the integer linear, exactly, and its scales as linears.rescale rounds them.
  template <int CHUNK, int N>
  __device__ void read_dt(const TokenChunk<CHUNK, N>& chunk, int first, float (&dt)[STRIP]) const {
    int sums[STRIP];
#pragma unroll
    for (int t = 0; t < STRIP; t++) sums[t] = -chunk.zero_point[first + t] * weight_sum;
#pragma unroll 2
    for (int quad = 0; quad < quads; quad++) {
      const int w = four_weights(quad);
      const auto codes = *reinterpret_cast<const Vector<int, STRIP>*>(chunk.codes + quad * CHUNK + first);
#pragma unroll
      for (int t = 0; t < STRIP; t++) sums[t] = __dp4a(codes.values[t], w, sums[t]);
    }
#pragma unroll
    for (int t = 0; t < STRIP; t++) {
      const float delta = __fmul_rn(__fmul_rn(static_cast<float>(sums[t]), chunk.scale[first + t]), weight_scale);
      dt[t] = softplus(__fadd_rn(delta, bias));
    }
  }
};

// The tokens of STRIP positions, the first of which is `first`; -1 behind the last one.
__device__ inline void read_tokens(const DirectionalScan& s, int64_t direction, int64_t first, int (&tokens)[STRIP]) {
#pragma unroll
  for (int t = 0; t < STRIP; t++) {
    tokens[t] = first + t < s.length ? checked_token(s.order[direction * s.length + first + t], -1, s.tokens) : -1;
  }
}

// u of some tokens; zeros where there is none.
template <class T>
__device__ void read_inputs(const T* u, int64_t row, const int (&tokens)[STRIP], float (&values)[STRIP]) {
#pragma unroll
  for (int t = 0; t < STRIP; t++) values[t] = tokens[t] < 0 ? 0.0f : to_float(u[tokens[t] * row]);
}

__device__ inline float gated(const DirectionalScan& s, float y, int64_t image, int64_t token, int64_t channel) {
  return y * (s.z.data ? silu(read(s.z, image, token, channel)) * s.factor : s.factor);
}

// The result of a token and channel, from the sum of all directions.
__device__ inline void finish(const DirectionalScan& s, float sum, int64_t image, int64_t token, int64_t channel) {
  const int64_t at = (image * s.tokens + token) * s.channels + channel;
  const float y = gated(s, sum, image, token, channel);
  if (s.codes) {
    const float* smooth = s.qparams.inv_smooth;
    s.codes[at] = static_cast<int8_t>(RowQParams(s.qparams, token).code(smooth ? __fmul_rn(y, smooth[channel]) : y));
  } else {
    write(s.y, s.y_type, at, y);
  }
}

}  // namespace ptq4vm::cuda
