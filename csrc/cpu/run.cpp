// The kernels of the instruction set in use, in parallel.
#include "../bindings/run.h"

#include "kernels.h"

namespace ptq4vm {
namespace {

constexpr int64_t WORTH_A_THREAD = 32768;  // numbers

template <class Operator>
void parallel(const Operator& q, int64_t items, int64_t numbers) {
  const auto kernel = kernels().of(q);
  const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, numbers));
  parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(q, begin, end); });
}

}  // namespace

#define PTQ4VM_OPERATOR(Operator, items, numbers) \
  void run(const Tensor&, const Operator& q) { parallel(q, items, numbers); }
#define PTQ4VM_CPU_OPERATOR PTQ4VM_OPERATOR
#include "../operators.def"

// Panels' sums stay in the second cache, and there are equally many panels for every thread.
Optional workspace(DirectionalScan& q, const Tensor&) {
  constexpr int64_t CACHED = 320 * 1024, SMALLEST = 64;  // floats; channels
  const int64_t threads = get_num_threads();
  const int64_t most = std::clamp(CACHED / std::max<int64_t>(1, q.tokens), SMALLEST, PANEL);
  int64_t panels = divided_up(q.channels, most);
  while (panels < groups(q.channels) && q.batch * panels % threads) panels++;
  q.panel = std::max<int64_t>(1, divided_up(groups(q.channels), std::max<int64_t>(1, panels))) * LANES;
  return std::nullopt;
}

}  // namespace ptq4vm
