// ops.conv1d_quantize, ops.causal_conv1d and ops.causal_conv1d_backward in float32: outputs and gradients
// differ from those in float64 by about 1e-6 of the largest. Channels lie in lanes; all channels of a share of the work
// take a chunk of tokens before any takes the next, so that memory is read row by row.
#include <algorithm>
#include <vector>

#include "quantize.h"

namespace ptq4vm::PTQ4VM_SET {
namespace {

constexpr int64_t CHUNK = 16;  // tokens of the adjoint
constexpr int64_t WINDOW = 8;  // tokens of the convolution: fewer than the lines that a set of the first cache holds

// Calls work(image, first channel, last channel) for groups [begin, end), where a direction's images follow the one's
// before.
template <class Work>
void for_images(const Conv& c, int64_t begin, int64_t end, Work work) {
  const int64_t all = groups(c.channels);
  while (begin < end) {
    const int64_t group = begin % all, count = std::min(all - group, end - begin);
    work(begin / all, group * LANES, std::min(c.channels, (group + count) * LANES));
    begin += count;
  }
}

// TAPS is their number, or 0 where it is not known: then c.taps.
template <int TAPS>
struct Filter {
  const Conv& c;
  const float* x;  // the first token of the image, at the channel
  int64_t left;    // channels
  const f32xw* weights;
  f32xw bias;

  Filter(const Conv& conv, int64_t image, int64_t channel, const f32xw* vectors)
      : c(conv), x(static_cast<const float*>(conv.x.data) + image * conv.tokens * conv.channels + channel),
        left(conv.channels - channel), weights(vectors),
        bias(conv.bias ? load_lanes(conv.bias + channel, left) : f32xw{}) {}

  int64_t taps() const { return TAPS ? TAPS : c.taps; }
  f32xw input(int64_t t, int64_t k) const { return load_lanes(x + (t + 1 - taps() + k) * c.channels, left); }

  // y before SiLU
  f32xw operator()(int64_t t) const {
    f32xw y = bias;
    if (t + 1 >= taps()) {
      for (int64_t k = 0; k < taps(); k++) y += weights[k] * input(t, k);
    } else {
      for (int64_t k = taps() - 1 - t; k < taps(); k++) y += weights[k] * input(t, k);
    }
    return y;
  }
};

// A chunk of tokens [start, stop) of some vectors of channels.
template <class T>
struct ConvChunk {
  const T* x;  // of the first token and channel, as y and codes
  T* y;
  int8_t* codes;              // or null
  const int32_t* order;       // or null
  const RowQParams* qparams;  // of the chunk
  int64_t start, stop, x_row, channels, taps;
  bool silu;
};

// A vector of channels: what it reads, and keeps for the next chunk, the last taps - 1 inputs.
struct ConvLanes {
  const f32xw* weights;
  f32xw* past;
  f32xw bias, inv_smooth;
};

// TAPS is the number of taps, which then lie in registers, or 0; vectors have `count` channels, all lanes if WHOLE. A
// function of its own, without calls: then there are enough registers.
template <int TAPS, bool WHOLE, class T>
__attribute__((noinline)) void convolve(const ConvChunk<T>& chunk, const ConvLanes* lanes, int64_t vectors,
                                        int64_t count) {
  const ConvChunk<T> c = chunk;  // codes could be anywhere, for all that the compiler knows
  const int64_t taps = TAPS ? TAPS : c.taps, left = WHOLE ? WIDTH : count;
  for (int64_t v = 0; v < vectors; v++) {
    const f32xw bias = lanes[v].bias, inv_smooth = lanes[v].inv_smooth;
    f32xw own[TAPS ? 2 * TAPS : 1];
    for (int k = 0; k < TAPS; k++) own[k] = lanes[v].weights[k];
    for (int k = 0; k + 1 < TAPS; k++) own[TAPS + k] = lanes[v].past[k];
    const f32xw* w = TAPS ? own : lanes[v].weights;
    f32xw* last = TAPS ? own + TAPS : lanes[v].past;
    const T* x = c.x + v * WIDTH;
    T* y = c.y + v * WIDTH;
    int8_t* codes = c.codes ? c.codes + v * WIDTH : nullptr;
    for (int64_t t = c.start; t < c.stop; t++) {
      const int64_t token = c.order ? c.order[t] : t;
      const f32xw now = load_lanes(x + token * c.x_row, left);
      f32xw value = bias;
      for (int64_t k = 0; k + 1 < taps; k++) value += w[k] * last[k];
      value += w[taps - 1] * now;
      for (int64_t k = 0; k + 2 < taps; k++) last[k] = last[k + 1];
      if (taps > 1) last[taps - 2] = now;
      if (c.silu) value = silu(value);
      store_lanes(y + token * c.channels, value, left);
      if (codes) store_codes(codes + token * c.channels, value * inv_smooth, c.qparams[t - c.start], left);
    }
    for (int k = 0; k + 1 < TAPS; k++) lanes[v].past[k] = last[k];
  }
}

template <int TAPS, class T>
void forward(const Conv& c, int64_t begin, int64_t end) {
  const int64_t E = c.channels, taps = c.taps, vectors = vectors_of(E);
  std::vector<f32xw> weights(vectors * taps), past(vectors * (taps - 1) + 1);
  std::vector<ConvLanes> lanes(vectors);
  std::vector<RowQParams> qparams(WINDOW, RowQParams(1.0f, 0, 0, 0));
  for_images(c, begin, end, [&](int64_t item, int64_t first, int64_t last) {
    const int64_t direction = item / c.batch, image = item % c.batch, whole = (last - first) / WIDTH;
    for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
      const int64_t at = direction * E + e, left = E - e;
      load_columns(c.weight + at * taps, taps, left, &weights[v * taps]);
      lanes[v] = {&weights[v * taps], &past[v * (taps - 1)], c.bias ? load_lanes(c.bias + at, left) : f32xw{},
                  c.qparams.inv_smooth ? load_lanes(c.qparams.inv_smooth + at, left) : fill(1.0f)};
    }
    std::fill(past.begin(), past.end(), f32xw{});
    ConvChunk<T> chunk{.x = static_cast<const T*>(c.x.data) + image * c.x.image + first,
                       .y = static_cast<T*>(c.y) + item * c.tokens * E + first,
                       .codes = c.codes ? c.codes + item * c.tokens * E + first : nullptr,
                       .order = c.order ? c.order + direction * c.tokens : nullptr,
                       .qparams = qparams.data(),
                       .start = 0,
                       .stop = 0,
                       .x_row = c.x.row,
                       .channels = E,
                       .taps = taps,
                       .silu = c.silu};
    for (chunk.start = 0; chunk.start < c.tokens; chunk.start = chunk.stop) {
      chunk.stop = std::min(chunk.start + WINDOW, c.tokens);
      for (int64_t t = chunk.start; c.codes && t < chunk.stop; t++) {
        qparams[t - chunk.start] = RowQParams(c.qparams, chunk.order ? chunk.order[t] : t, direction);
      }
      convolve<TAPS, true>(chunk, lanes.data(), whole, WIDTH);
      if (first + whole * WIDTH < last) {
        ConvChunk<T> rest = chunk;
        rest.x += whole * WIDTH, rest.y += whole * WIDTH;
        if (rest.codes) rest.codes += whole * WIDTH;
        convolve<TAPS, false>(rest, &lanes[whole], 1, last - first - whole * WIDTH);
      }
    }
  });
}

template <int TAPS>
void backward(const ConvBackward& b, int64_t begin, int64_t end) {
  const Conv& c = b.forward;
  const int64_t taps = TAPS ? TAPS : c.taps, E = c.channels, vectors = vectors_of(E);
  std::vector<f32xw> weights(vectors * taps), grad_weights(vectors * taps), grad_bias(vectors), grad(CHUNK + taps - 1);
  for_images(c, begin, end, [&](int64_t image, int64_t first, int64_t last) {
    for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
      load_columns(c.weight + e * taps, taps, E - e, &weights[v * taps]);
    }
    std::fill(grad_weights.begin(), grad_weights.end(), f32xw{});
    std::fill(grad_bias.begin(), grad_bias.end(), f32xw{});
    for (int64_t start = 0; start < c.tokens; start += CHUNK) {
      const int64_t stop = std::min(start + CHUNK, c.tokens);
      for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
        const Filter<TAPS> filter(c, image, e, &weights[v * taps]);
        const int64_t origin = image * c.tokens * E + e;
        // The later tokens that an input reaches come again with the next chunk: cheaper than to keep them.
        for (int64_t t = start; t < stop + taps - 1; t++) {
          f32xw g{};
          if (t < c.tokens) g = load_lanes(b.grad + origin + t * E, filter.left);
          if (t < c.tokens && c.silu) g *= silu_with_slope(filter(t)).slope;
          grad[t - start] = g;
        }
        for (int64_t t = start; t < stop; t++) {
          f32xw sum{};
          for (int64_t k = 0; k < taps; k++) sum += filter.weights[k] * grad[t - start + taps - 1 - k];
          store_lanes(b.x + origin + t * E, sum, filter.left);
        }
        // Sums of chunks are summed: long ones lose less.
        for (int64_t k = 0; k < taps; k++) {
          f32xw sum{};
          for (int64_t t = std::max(start, taps - 1 - k); t < stop; t++) sum += grad[t - start] * filter.input(t, k);
          grad_weights[v * taps + k] += sum;
        }
        f32xw sum{};
        for (int64_t t = start; t < stop; t++) sum += grad[t - start];
        grad_bias[v] += sum;
      }
    }
    for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
      store_columns(b.weight + (image * E + e) * taps, taps, E - e, &grad_weights[v * taps]);
      if (c.bias) store_lanes(b.bias + image * E + e, grad_bias[v], E - e);
    }
  });
}

}  // namespace

void run(const Conv& c, int64_t begin, int64_t end) {
  with_type(c.x.type, [&](auto t) {
    c.taps == 4 ? forward<4, decltype(t)>(c, begin, end) : forward<0, decltype(t)>(c, begin, end);
  });
}

void run(const ConvBackward& b, int64_t begin, int64_t end) {
  b.forward.taps == 4 ? backward<4>(b, begin, end) : backward<0>(b, begin, end);
}

}  // namespace ptq4vm::PTQ4VM_SET
