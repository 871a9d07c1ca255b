// ops.directional_scan and ops.directional_scan_quantize. A thread has a channel and its states; orders are index
// arithmetic, and threads with neighbouring channels read neighbouring numbers in any of them. The codes of dt's
// linear, B and C are made once for all channels of a block, in shared memory. No direction names a token twice.
//
// Sums over directions have one order, which depends on nothing but the shapes and the orders. They lie in shared
// memory where that is enough, else in y if that is float32, else in memory of the caller.
#include "scan.cuh"

namespace ptq4vm::cuda {
namespace {

constexpr size_t MAX_SUM_BYTES = 32 << 10;  // bytes of shared memory: more would leave few blocks to a multiprocessor
constexpr int MAX_DIRECTIONS = 4;           // at once

// The sums of one channel of an image.
struct Sums {
  float* at;
  int64_t row;

  __device__ float& operator[](int64_t token) const { return at[token * row]; }
};

template <int LANES>
__host__ __device__ bool sums_fit(const DirectionalScan& s) {
  return s.tokens * LANES * sizeof(float) <= MAX_SUM_BYTES;
}

template <int LANES>
__host__ __device__ bool sums_in_shared(const DirectionalScan& s) {
  return s.merge && sums_fit<LANES>(s);
}

bool sums_in_y(const DirectionalScan& s) { return s.merge && !s.codes && s.y_type == Float::f32; }

template <int LANES>
size_t words_of_sums(const DirectionalScan& s) {
  return sums_in_shared<LANES>(s) ? s.tokens * LANES : 0;
}

// A block has LANES channels of an image; threadIdx.y is one of its groups of threads.
template <int LANES>
struct Panel {
  const DirectionalScan& s;
  int64_t image, e, channel;
  int lane, group, groups;
  bool inside;
  Sums sums;

  __device__ Panel(const DirectionalScan& scan, float* shared)
      : s(scan), lane(threadIdx.x), group(threadIdx.y), groups(blockDim.y) {
    const int64_t panels = ceil_div<int64_t>(s.channels, LANES);
    image = blockIdx.x / panels;
    e = blockIdx.x % panels * LANES + lane;
    inside = e < s.channels;
    channel = min(e, s.channels - 1);  // threads without one take the last, and write nothing
    if (sums_in_shared<LANES>(s))
      sums = {shared + lane, LANES};
    else
      sums = {s.sums + image * s.tokens * s.channels + channel, s.channels};
  }

  // Tokens that a direction does not name are zeros.
  __device__ void clear() const {
    if (inside) {
      for (int64_t token = group; token < s.tokens; token += groups) {
        if (s.merge) sums[token] = 0.0f;
        for (int64_t k = 0; !s.merge && k < s.directions; k++) write(s.y, s.y_type, place(k, token), 0.0f);
      }
    }
    __syncthreads();
  }

  __device__ void add(int64_t token, float y) const {
    if (inside && token >= 0) sums[token] += y;
  }

  __device__ void write_direction(int64_t k, int64_t token, float y) const {
    if (inside && token >= 0) write(s.y, s.y_type, place(k, token), gated(s, y, image, token, channel));
  }

  __device__ void finish_all() const {
    if (!inside || !s.merge) return;
    for (int64_t token = group; token < s.tokens; token += groups) finish(s, sums[token], image, token, channel);
  }

 private:
  __device__ int64_t place(int64_t k, int64_t token) const {
    return ((k * s.batch + image) * s.tokens + token) * s.channels + channel;
  }
};

// Directions at once, each of them one warp, which waits for others only to add to the sums.
template <int N, class T>
__global__ void __launch_bounds__(WARP_SIZE* MAX_DIRECTIONS, 4) warps_kernel(DirectionalScan s) {
  PTQ4VM_DYNAMIC_SHARED(float, memory);  // sums, a chunk for every warp, states
  const Panel<WARP_SIZE> panel(s, memory);
  float* free = memory + (sums_in_shared<WARP_SIZE>(s) ? s.tokens * WARP_SIZE : 0);
  const TokenChunk<STRIP, N> chunk(s, free + panel.group * chunk.words(s));
  free += panel.groups * chunk.words(s);

  panel.clear();
  for (int64_t first = 0; first < s.directions; first += panel.groups) {
    const int64_t k = min(first + panel.group, s.directions - 1);
    const bool active = first + panel.group < s.directions;
    const Channel channel(s, k, panel.channel);
    const T* u = static_cast<const T*>(s.u.data) + k * s.u_direction + panel.image * s.u.image + panel.channel;
    States<N> states(s.A + (k * s.channels + panel.channel) * s.states, s.states, free);
    for (int64_t begin = 0; begin < s.length; begin += STRIP) {
      float dt[STRIP], y[STRIP];
      int tokens[STRIP];
      read_tokens(s, k, begin, tokens);
      read_inputs(u, s.u.row, tokens, y);
      __syncwarp();
      chunk.fill(s, k, panel.image, begin, panel.lane, WARP_SIZE);
      __syncwarp();
      channel.read_dt(chunk, 0, dt);
#pragma unroll
      for (int t = 0; t < STRIP; t++) {
        y[t] = channel.skip * y[t] +
               states.advance(dt[t], dt[t] * y[t], chunk.coefficients + t * chunk.coefficient_count(s));
      }
      read_tokens(s, k, begin, tokens);  // again: there are not enough registers to keep them
      if (!s.merge) {
        for (int t = 0; active && t < STRIP; t++) panel.write_direction(k, tokens[t], y[t]);
        continue;
      }
      for (int turn = 0; turn < panel.groups; turn++) {
        if (active && turn == panel.group) {
#pragma unroll
          for (int t = 0; t < STRIP; t++) panel.add(tokens[t], y[t]);
        }
        __syncthreads();
      }
    }
  }
  panel.finish_all();
}

// One state, and one direction after the other. Every group of threads has STRIP of a chunk's positions: it runs them
// from a state of zero, and adds what the state before them becomes when all groups know theirs.
template <int LANES, int GROUPS, class T>
__global__ void __launch_bounds__(LANES* GROUPS, 3) segments_kernel(DirectionalScan s) {
  constexpr int CHUNK = GROUPS * STRIP;
  PTQ4VM_DYNAMIC_SHARED(float, memory);  // sums, a chunk
  PTQ4VM_SHARED(float, last, [GROUPS][LANES]);
  PTQ4VM_SHARED(float, decay, [GROUPS][LANES]);
  const Panel<LANES> panel(s, memory);
  const TokenChunk<CHUNK, 1> chunk(s, memory + (sums_in_shared<LANES>(s) ? s.tokens * LANES : 0));
  const int own = panel.group * STRIP, lane = panel.lane;

  panel.clear();
  for (int64_t k = 0; k < s.directions; k++) {
    const Channel channel(s, k, panel.channel);
    const T* u = static_cast<const T*>(s.u.data) + k * s.u_direction + panel.image * s.u.image + panel.channel;
    const float rate = s.A[k * s.channels + panel.channel] * LOG2_E;
    float state = 0.0f;
    for (int64_t begin = 0; begin < s.length; begin += CHUNK) {
      float dt[STRIP], y[STRIP], weight[STRIP];  // of the state before, in y
      int tokens[STRIP];
      read_tokens(s, k, begin + own, tokens);
      read_inputs(u, s.u.row, tokens, y);
      chunk.fill(s, k, panel.image, begin, panel.group * LANES + lane, LANES * GROUPS);
      __syncthreads();
      channel.read_dt(chunk, own, dt);
      float h = 0.0f, whole = 1.0f;
#pragma unroll
      for (int t = 0; t < STRIP; t++) {
        const float B = chunk.coefficients[2 * (own + t)], C = chunk.coefficients[2 * (own + t) + 1];
        const Decay decayed(dt[t] * rate);
        h = decayed(h, dt[t] * y[t] * B);
        whole = decayed(whole, 0.0f);
        y[t] = channel.skip * y[t] + h * C;
        weight[t] = whole * C;
      }
      last[panel.group][lane] = h, decay[panel.group][lane] = whole;
      __syncthreads();
      float before = 0.0f;
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        if (group == panel.group) before = state;
        state = fmaf(state, decay[group][lane], last[group][lane]);
      }
#pragma unroll
      for (int t = 0; t < STRIP; t++) {
        y[t] = fmaf(before, weight[t], y[t]);
        if (s.merge)
          panel.add(tokens[t], y[t]);
        else
          panel.write_direction(k, tokens[t], y[t]);
      }
      __syncthreads();
    }
  }
  panel.finish_all();
}

template <int LANES>
unsigned blocks(const DirectionalScan& s) {
  return static_cast<unsigned>(s.batch * ceil_div<int64_t>(s.channels, LANES));
}

template <int N, class T>
void launch_warps(const DirectionalScan& s, Stream stream) {
  const int groups = static_cast<int>(std::min<int64_t>(s.directions, MAX_DIRECTIONS));
  const size_t words = words_of_sums<WARP_SIZE>(s) + groups * TokenChunk<STRIP, N>::words(s) +
                       States<N>::words(s.states, groups * WARP_SIZE);
  PTQ4VM_LAUNCH(warps_kernel<N, T>, blocks<WARP_SIZE>(s), dim3(WARP_SIZE, groups), words * sizeof(float), stream, s);
}

template <int LANES, int GROUPS, class T>
void launch_segments(const DirectionalScan& s, Stream stream) {
  const size_t words = words_of_sums<LANES>(s) + TokenChunk<GROUPS * STRIP, 1>::words(s);
  PTQ4VM_LAUNCH(segments_kernel<LANES, GROUPS, T>, blocks<LANES>(s), dim3(LANES, GROUPS), words * sizeof(float), stream,
                s);
}

}  // namespace

int64_t directional_scan_sums(const DirectionalScan& s) {
  return s.merge && !sums_in_y(s) && !sums_in_shared<WARP_SIZE>(s) ? s.batch * s.tokens * s.channels : 0;
}

void run(const DirectionalScan& scan, Stream stream) {
  if (scan.directions == 0) return;
  DirectionalScan s = scan;
  if (sums_in_y(s)) s.sums = static_cast<float*>(s.y);
  with_type(s.u.type, [&](auto t) {
    using T = decltype(t);
    if (s.states == 16) return launch_warps<16, T>(s, stream);
    if (s.states != 1) return launch_warps<0, T>(s, stream);
    // Long sequences are maps of many tokens and few channels, which need more threads a channel.
    if (sums_fit<WARP_SIZE>(s)) return launch_segments<32, 8, T>(s, stream);
    launch_segments<16, 16, T>(s, stream);
  });
}

}  // namespace ptq4vm::cuda
