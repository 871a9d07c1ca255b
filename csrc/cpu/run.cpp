// The kernels of the instruction set in use, in parallel.
#include "../run.h"

#include "kernels.h"

namespace ptq4vm {
namespace {

constexpr int64_t SHARE = 32768;  // numbers that are worth a thread

int64_t grain(int64_t numbers) { return std::max<int64_t>(1, SHARE / std::max<int64_t>(1, numbers)); }

template <class Operator>
void parallel(void (*kernel)(const Operator&, int64_t, int64_t), const Operator& q, int64_t items, int64_t grain) {
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(q, begin, end); });
}

}  // namespace

void run(const Quantize& q, const Tensor&) { parallel(kernels().quantize, q, q.rows, grain(q.channels)); }

void run(const ChooseQparams& q, const Tensor&) { parallel(kernels().choose_qparams, q, q.rows, grain(q.channels)); }

void run(const Dequantize& q, const Tensor&) { parallel(kernels().dequantize, q, q.rows, grain(q.channels)); }

void run(const Rotate& q, const Tensor&) { parallel(kernels().rotate, q, q.rows, grain(q.rotation.channels)); }

void run(const RotateQuantize& q, const Tensor&) {
  parallel(kernels().rotate_quantize, q, q.rows, grain(q.rotation.channels));
}

void run(const NormQuantize& q, const Tensor&) { parallel(kernels().norm_quantize, q, q.rows, grain(q.channels)); }

void run(const Conv& q, const Tensor&) {
  parallel(kernels().conv, q, q.tokens ? q.directions * q.batch * groups(q.channels) : 0, grain(q.tokens * LANES));
}

void run(const Conv2d& q, const Tensor&) {
  const bool empty = q.batch == 0 || q.width == 0 || q.channels == 0;
  parallel(kernels().conv2d, q, empty ? 0 : q.batch * q.height, grain(q.width * q.channels));
}

void run(const Scan& q, const Tensor&) { parallel(kernels().scan, q, q.tokens ? q.batch * groups(q.channels) : 0, 1); }

// Panels' sums stay in the second cache, and there are equally many panels for every thread.
void run(DirectionalScan q, const Tensor&) {
  constexpr int64_t CACHED = 320 * 1024, SMALLEST = 64;  // floats; channels
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = std::clamp(CACHED / std::max<int64_t>(1, q.tokens), SMALLEST, PANEL);
  int64_t panels = divided_up(q.channels, most);
  if (!q.tokens || !q.batch || !q.channels) return;
  while (panels < groups(q.channels) && q.batch * panels % threads) panels++;
  q.panel = std::max<int64_t>(1, divided_up(groups(q.channels), std::max<int64_t>(1, panels))) * LANES;
  parallel(kernels().directional_scan, q, q.batch * divided_up(q.channels, q.panel), 1);
}

}  // namespace ptq4vm
