// reference.causal_conv1d and reference.causal_conv1d_backward in float32: outputs and gradients differ from those in
// float64 by about 1e-6 of the largest. Channels lie in lanes; all channels of a share of the work take a chunk of
// tokens before any takes the next, so that memory is read row by row.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "math.h"

namespace ptq4vm {
namespace PTQ4VM_SET {
namespace {

constexpr int64_t CHUNK = 16;  // tokens

// work(image, first channel, last channel) for groups [begin, end).
template <class Work>
void for_images(const Conv& c, int64_t begin, int64_t end, Work work) {
  const int64_t groups = (c.channels + LANES - 1) / LANES;
  while (begin < end) {
    const int64_t group = begin % groups, count = std::min(groups - group, end - begin);
    work(begin / groups, group * LANES, std::min(c.channels, (group + count) * LANES));
    begin += count;
  }
}

// One vector for each tap of the channels in lanes.
void load_weights(const Conv& c, int64_t channel, f32xw* weights) {
  const int64_t count = std::min(WIDTH, c.channels - channel);
  for (int64_t k = 0; k < c.taps; k++) {
    float lanes[WIDTH] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = c.weight[(channel + i) * c.taps + k];
    weights[k] = load_as<f32xw>(lanes);
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
      : c(conv), x(conv.x + image * conv.tokens * conv.channels + channel), left(conv.channels - channel),
        weights(vectors), bias(conv.bias ? load_lanes(conv.bias + channel, left) : f32xw{}) {}

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

template <int TAPS>
void forward(const Conv& c, int64_t begin, int64_t end) {
  std::vector<f32xw> weights((c.channels + WIDTH - 1) / WIDTH * c.taps);
  for_images(c, begin, end, [&](int64_t image, int64_t first, int64_t last) {
    for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) load_weights(c, e, &weights[v * c.taps]);
    for (int64_t start = 0; start < c.tokens; start += CHUNK) {
      const int64_t stop = std::min(start + CHUNK, c.tokens);
      for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) {
        const Filter<TAPS> filter(c, image, e, &weights[v * c.taps]);
        float* y = c.y + image * c.tokens * c.channels + e;
        for (int64_t t = start; t < stop; t++) {
          store_lanes(y + t * c.channels, c.silu ? silu(filter(t)) : filter(t), filter.left);
        }
      }
    }
  });
}

template <int TAPS>
void backward(const ConvBackward& b, int64_t begin, int64_t end) {
  const Conv& c = b.forward;
  const int64_t taps = TAPS ? TAPS : c.taps, E = c.channels, vectors = (E + WIDTH - 1) / WIDTH;
  std::vector<f32xw> weights(vectors * taps), grad_weights(vectors * taps), grad_bias(vectors), grad(CHUNK + taps - 1);
  for_images(c, begin, end, [&](int64_t image, int64_t first, int64_t last) {
    for (int64_t e = first, v = 0; e < last; e += WIDTH, v++) load_weights(c, e, &weights[v * taps]);
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
      for (int64_t k = 0; k < taps; k++) {
        float lanes[WIDTH];
        store_lanes(lanes, grad_weights[v * taps + k], WIDTH);
        for (int64_t i = 0; i < std::min(WIDTH, E - e); i++) b.weight[(image * E + e + i) * taps + k] = lanes[i];
      }
      if (c.bias) store_lanes(b.bias + image * E + e, grad_bias[v], E - e);
    }
  });
}

}  // namespace

void conv(const Conv& c, int64_t begin, int64_t end) {
  c.taps == 4 ? forward<4>(c, begin, end) : forward<0>(c, begin, end);
}

void conv_backward(const ConvBackward& b, int64_t begin, int64_t end) {
  b.forward.taps == 4 ? backward<4>(b, begin, end) : backward<0>(b, begin, end);
}

}  // namespace PTQ4VM_SET
}  // namespace ptq4vm
