// The integer linears on a GPU. A weight in rows is read as it lies; one in the CPU's tiles, of a model that was fused
// before it was moved, is copied into rows at every call, and so are codes of x that are not padded.
#include "../bindings/linear_inputs.h"
#include "../bindings/run.h"
#include "linear.h"
#include "repack.h"
#include "start.h"

namespace ptq4vm {
namespace {

using cuda::Layout;

// The codes themselves where they lie in padded rows, else a copy that does.
Tensor in_padded_rows(const Tensor& memory, const cuda::CodeMatrix& codes, bool nibbles, int64_t padded,
                      cuda::Stream stream) {
  const bool same = codes.layout == (nibbles ? Layout::nibbles : Layout::bytes);
  const int64_t columns = nibbles ? padded / 2 : padded;
  if (same && codes.columns == columns && reinterpret_cast<uintptr_t>(codes.data) % 16 == 0) return memory;
  Tensor copy = empty_like(memory, {codes.directions, codes.rows, columns}, ScalarType::Char);
  cuda::repack(codes, copy.mutable_data_ptr(), nibbles, padded, stream);
  return copy;
}

cuda::CodeMatrix matrix(const Tensor& codes, Layout layout, int64_t directions, int64_t rows, int64_t channels) {
  return {.data = codes.const_data_ptr(),
          .layout = layout,
          .directions = directions,
          .rows = rows,
          .channels = channels,
          .columns = channels_of(codes)};
}

cuda::CodeMatrix weight_codes(const LinearInputs& i) {
  const Layout layout =
      i.in_rows ? (i.nibbles ? Layout::nibbles : Layout::bytes) : (i.nibbles ? Layout::nibble_tiles : Layout::tiles);
  return matrix(i.weight, layout, i.directions, i.features, i.channels);
}

// `qparams` are null, or those of the codes that are written.
Tensor run_linear(const LinearInputs& i, ScalarType type, const QParams* qparams) {
  Tensor y = empty_like(i.x, with_channels(i.x, i.features), type);
  cuda::launch(i.x, [&](cuda::Stream stream) {
    const int capability = cuda::capability(i.x.get_device_index());
    // Nibbles in rows say that x has codes of 4 bits too.
    const bool nibbles = i.in_rows && i.nibbles && cuda::multiplies_nibbles(capability);
    const int64_t padded = round_up(i.channels, nibbles ? 32 : 16);
    const cuda::CodeMatrix inputs = matrix(i.x, Layout::bytes, i.directions, i.rows, i.channels);
    const Tensor x = in_padded_rows(i.x, inputs, nibbles, padded, stream);
    const Tensor weight = in_padded_rows(i.weight, weight_codes(i), nibbles, padded, stream);
    const cuda::LinearProblem p{.x = x.const_data_ptr(),
                                .x_scale = const_ptr<float>(i.x_scale),
                                .zero_point = const_ptr<int32_t>(i.zero_point),
                                .weight = weight.const_data_ptr(),
                                .weight_sum = const_ptr<int32_t>(i.sum),
                                .weight_scale = const_ptr<float>(i.scale),
                                .bias = const_ptr<float>(i.bias),
                                .y = qparams ? nullptr : y.mutable_data_ptr(),
                                .y_type = float_type(type),
                                .codes = qparams ? mutable_ptr<uint8_t>(y) : nullptr,
                                .nibbles = false,
                                .codes_row = i.features,
                                .qparams = qparams ? *qparams : QParams{},
                                .directions = i.directions,
                                .rows = i.rows,
                                .scales = i.scales,
                                .channels = padded,
                                .features = i.features};
    PTQ4VM_CHECK(cuda::linear(p, nibbles, capability, stream), i.directions, " linears of ", i.rows, " rows and ",
                 i.features, " output channels do not fit one launch");
  });
  return y;
}

}  // namespace

std::tuple<Tensor, Tensor> pack_plain_weight(const Tensor& weight, int64_t channels) {
  const bool nibbles = weight.scalar_type() == ScalarType::Byte;
  const int64_t features = weight.size(0), padded = round_up(channels, 16);
  Tensor rows = weight, sum = empty_like(weight, {features}, ScalarType::Int);
  const cuda::CodeMatrix codes = matrix(weight, nibbles ? Layout::nibbles : Layout::bytes, 1, features, channels);
  cuda::launch(weight, [&](cuda::Stream stream) {
    cuda::sum_codes(codes, mutable_ptr<int32_t>(sum), stream);
    if (!nibbles && channels == padded) return;
    rows = empty_like(weight, {features, padded}, ScalarType::Char);
    cuda::repack(codes, rows.mutable_data_ptr(), false, padded, stream);
  });
  return {rows, sum};
}

Tensor run_linear(const LinearInputs& i, ScalarType type) { return run_linear(i, type, nullptr); }

Tensor run_linear_gelu(const LinearInputs& i, const QParams& qparams) {
  return run_linear(i, ScalarType::Char, &qparams);
}

Tensor run_linear_gelu_rotated(const LinearInputs& i, const QParams& qparams) {
  const Tensor y = run_linear(i, ScalarType::Float);
  const RotationMatrix rotation(i.features);
  Tensor codes = empty_like(y, ScalarType::Char);
  run(y, RotateQuantize{.x = y.const_data_ptr(),
                        .x_type = Float::f32,
                        .gelu = true,
                        .rotation = rotation.view(),
                        .codes = mutable_ptr<int8_t>(codes),
                        .qparams = qparams,
                        .rows = i.rows});
  return codes;
}

}  // namespace ptq4vm
