// The kernels, on the current stream of the tensors' device.
#include "../bindings/run.h"

#include "start.h"

namespace ptq4vm {

#define PTQ4VM_OPERATOR(Operator, items, numbers)                         \
  void run(const Tensor& on, const Operator& q) {                         \
    cuda::launch(on, [&](cuda::Stream stream) { cuda::run(q, stream); }); \
  }
#define PTQ4VM_CPU_OPERATOR(Operator, items, numbers)
#include "../operators.def"

Optional workspace(DirectionalScan& q, const Tensor& on) {
  Tensor sums = empty_like(on, {cuda::directional_scan_sums(q)}, ScalarType::Float);
  q.sums = mutable_ptr<float>(sums);
  return sums;
}

}  // namespace ptq4vm
