// The integer linears on a GPU. A weight in rows is read as it lies; one in the CPU's tiles, of a model that was fused
// before it was moved, is copied into rows at every call, and so are codes of x that are not padded.
#include "../linear_inputs.h"
#include "../run.h"

#include "layout.h"
#include "linear.h"
#include "start.h"

namespace ptq4vm {
namespace {

using cuda::Layout;

// The codes themselves where they lie in padded rows, else a copy that does.
Tensor rows_of(const Tensor& memory, const cuda::Codes& codes, bool nibbles, int64_t padded, cuda::Stream stream) {
  const bool same = codes.layout == (nibbles ? Layout::nibbles : Layout::bytes);
  const int64_t columns = nibbles ? padded / 2 : padded;
  if (same && codes.columns == columns && reinterpret_cast<uintptr_t>(codes.data) % 16 == 0) return memory;
  Tensor copy = make(memory, {codes.directions, codes.rows, columns}, ScalarType::Char);
  cuda::repack(codes, copy.mutable_data_ptr(), nibbles, padded, stream);
  return copy;
}

cuda::Codes weight_codes(const LinearInputs& i) {
  const Layout layout =
      i.in_rows ? (i.nibbles ? Layout::nibbles : Layout::bytes) : (i.nibbles ? Layout::nibble_tiles : Layout::tiles);
  const int64_t columns = i.in_rows ? i.weight.size(i.weight.dim() - 1) : 0;
  return {i.weight.const_data_ptr(), layout, i.directions, i.features, i.channels, columns};
}

Tensor run(const char* name, const LinearInputs& i, ScalarType type, const Codes* gelu = nullptr) {
  const auto shape = with_last(i.x, i.features);
  Tensor y = torch::stable::new_empty(i.x, {shape.data(), shape.size()}, type);
  cuda::launch(name, i.x, [&](cuda::Stream stream) {
    const int capability = cuda::capability(i.x.get_device_index());
    // Nibbles in rows say that x has codes of 4 bits too.
    const bool nibbles = i.in_rows && i.nibbles && cuda::multiplies_nibbles(capability);
    const int64_t step = nibbles ? 32 : 16, padded = divided_up(i.channels, step) * step;
    const cuda::Codes codes{i.x.const_data_ptr(), Layout::bytes, i.directions, i.rows, i.channels, i.channels};
    const Tensor x = rows_of(i.x, codes, nibbles, padded, stream);
    const Tensor weight = rows_of(i.weight, weight_codes(i), nibbles, padded, stream);
    cuda::LinearProblem p{};
    p.x = x.const_data_ptr(), p.x_scale = in<float>(i.x_scale), p.zero_point = in<int32_t>(i.zero_point);
    p.weight = weight.const_data_ptr(), p.weight_sum = in<int32_t>(i.sum), p.weight_scale = in<float>(i.scale);
    p.bias = in<float>(i.bias);
    if (gelu) {
      p.codes = out<uint8_t>(y), p.codes_row = i.features, p.qparams = gelu->view();
    } else {
      p.y = y.mutable_data_ptr(), p.y_type = float_type(type);
    }
    p.directions = i.directions, p.rows = i.rows, p.scales = i.scales, p.channels = padded, p.features = i.features;
    PTQ4VM_CHECK(cuda::linear(p, nibbles, capability, stream), "ptq4vm::", name, ": ", i.directions, " linears of ",
                 i.rows, " rows and ", i.features, " output channels do not fit one launch");
  });
  return y;
}

// Types that kernels do not write go by way of float32.
Tensor run_as(const char* name, const LinearInputs& inputs, ScalarType type) {
  const Tensor y = run(name, inputs, has_kernels(type) ? type : ScalarType::Float);
  return y.scalar_type() == type ? y : torch::stable::to(y, type);
}

Tensor linear_packed(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor sum, Tensor scale,
                     Optional bias, ScalarType type) {
  check_out_dtype(type);
  return run_as("linear_packed", LinearInputs(x, x_scale, zero_point, weight, sum, scale, bias), type);
}

Tensor linear(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor scale, Optional bias,
              ScalarType type) {
  check_out_dtype(type), check_plain_weight(x, weight, scale);
  const bool nibbles = weight.scalar_type() == ScalarType::Byte;
  const int64_t channels = x.size(x.dim() - 1), features = weight.size(0), padded = divided_up(channels, 16) * 16;
  weight = as_contiguous(weight);
  Tensor rows = weight, sum = make(weight, {features}, ScalarType::Int);
  const cuda::Codes codes{weight.const_data_ptr(), nibbles ? Layout::nibbles : Layout::bytes, 1, features, channels,
                          weight.size(1)};
  cuda::launch("linear", x, [&](cuda::Stream stream) {
    cuda::sum_codes(codes, out<int32_t>(sum), stream);
    if (!nibbles && channels == padded) return;
    rows = make(weight, {features, padded}, ScalarType::Char);
    cuda::repack(codes, rows.mutable_data_ptr(), false, padded, stream);
  });
  return run_as("linear", LinearInputs(x, x_scale, zero_point, rows, sum, scale, bias), type);
}

Tensor linear_gelu_quantize(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor sum, Tensor scale,
                            Optional bias, bool rotated, Tensor inv_scale, Tensor new_zero_point, Optional inv_smooth,
                            int64_t bits) {
  const LinearInputs linear(x, x_scale, zero_point, weight, sum, scale, bias);
  const Codes codes = gelu_codes(linear, inv_scale, new_zero_point, inv_smooth, bits);
  if (!rotated) return run("linear_gelu_quantize", linear, ScalarType::Char, &codes);
  const Tensor y = run("linear_gelu_quantize", linear, ScalarType::Float);
  const RotationOf rotation(linear.features);
  Tensor result = torch::stable::new_empty(y, y.sizes(), ScalarType::Char);
  ptq4vm::run(RotateQuantize{y.const_data_ptr(), Float::f32, true, rotation.view(), out<int8_t>(result), codes.view(),
                             linear.rows},
              y);
  return result;
}

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(PTQ4VM_LIBRARY, PTQ4VM_KEY, m) {
  PTQ4VM_IMPL(m, linear);
  PTQ4VM_IMPL(m, linear_packed);
  PTQ4VM_IMPL(m, linear_gelu_quantize);
}
