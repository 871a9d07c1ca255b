// The kernels of one instruction set, under its name.
#include "kernels.h"

#define PTQ4VM_JOIN_(a, b) a##b
#define PTQ4VM_JOIN(a, b) PTQ4VM_JOIN_(a, b)

namespace ptq4vm {
namespace PTQ4VM_SET {

void quantize(const Quantize&, int64_t, int64_t);
void pack(const Pack&, int64_t, int64_t);
void linear(const Linear&, int64_t, int64_t);
void linear_amx(const Linear&, int64_t, int64_t);
void scan(const Scan&, int64_t, int64_t);
void scan_quantized(const QuantizedScan&, int64_t, int64_t);
void scan_backward(const ScanBackward&, int64_t, int64_t);
void choose_qparams(const ChooseQparams&, int64_t, int64_t);
void dequantize(const Dequantize&, int64_t, int64_t);
void rotate(const Rotate&, int64_t, int64_t);
void rotate_quantize(const RotateQuantize&, int64_t, int64_t);
void norm_quantize(const NormQuantize&, int64_t, int64_t);
void directional_scan(const DirectionalScan&, int64_t, int64_t);
void conv(const Conv&, int64_t, int64_t);
void conv2d(const Conv2d&, int64_t, int64_t);
void conv_backward(const ConvBackward&, int64_t, int64_t);
void fake_quantize(const FakeQuantize&, int64_t, int64_t);
void fake_quantize_backward(const FakeQuantizeBackward&, int64_t, int64_t);

}  // namespace PTQ4VM_SET

const Kernels& PTQ4VM_JOIN(kernels_, PTQ4VM_SET)() {
  using namespace PTQ4VM_SET;
  static const Kernels table{quantize,
                             pack,
                             linear,
                             scan,
                             scan_quantized,
                             scan_backward,
                             directional_scan,
                             choose_qparams,
                             dequantize,
                             rotate,
                             rotate_quantize,
                             norm_quantize,
                             conv,
                             conv2d,
                             conv_backward,
                             fake_quantize,
                             fake_quantize_backward};
  return table;
}

#ifdef __AVX512VNNI__
const Kernels& kernels_amx() {
  using namespace PTQ4VM_SET;
  static const Kernels table{quantize,
                             pack,
                             linear_amx,
                             scan,
                             scan_quantized,
                             scan_backward,
                             directional_scan,
                             choose_qparams,
                             dequantize,
                             rotate,
                             rotate_quantize,
                             norm_quantize,
                             conv,
                             conv2d,
                             conv_backward,
                             fake_quantize,
                             fake_quantize_backward};
  return table;
}
#endif

}  // namespace ptq4vm
