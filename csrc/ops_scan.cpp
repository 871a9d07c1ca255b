// The scans on a CPU. Float64 runs in plain loops; every other floating type is computed in float32, and float32 and
// bfloat16 are read where they lie, also as parts of larger rows.
#include "float64.h"
#include "glue.h"

namespace ptq4vm {
namespace {

int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

Float float_type(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16 ? Float::bf16 : Float::f32; }

// float32 or bfloat16 with a contiguous last axis.
Tensor as_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  const bool kept = x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16;
  const Tensor typed = kept ? x : torch::stable::to(x, ScalarType::Float);
  return typed.size(last) <= 1 || typed.stride(last) == 1 ? typed : torch::stable::contiguous(typed);
}

Optional as_rows(const Optional& x) { return x ? Optional(as_rows(*x)) : std::nullopt; }

// The last three axes.
Rows rows(const Tensor& x) {
  return {x.const_data_ptr(), float_type(x), x.stride(x.dim() - 3), x.stride(x.dim() - 2)};
}

Rows rows(const Optional& x) { return x ? rows(*x) : Rows{}; }

struct ScanInputs {
  Tensor u, delta, A, B, C;
  Optional D, z, delta_bias;
  int64_t batch, tokens, channels, states;
  ScalarType type;
  bool softplus;

  ScanInputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
             const Optional& D_, const Optional& z_, const Optional& bias_, bool softplus_)
      : u(u_), delta(delta_), A(A_), B(B_), C(C_), D(D_), z(z_), delta_bias(bias_), softplus(softplus_) {
    STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2, "u must be (B, L, E) and A (E, S)");
    batch = u.size(0), tokens = u.size(1), channels = u.size(2), states = A.size(1);
    type = u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check_shape("delta", delta, {batch, tokens, channels});
    check_shape("A", A, {channels, states});
    check_shape("B", B, {batch, tokens, states});
    check_shape("C", C, {batch, tokens, states});
    check_shape("D", D, {channels});
    check_shape("z", z, {batch, tokens, channels});
    check_shape("delta_bias", delta_bias, {channels});
    A = as(A, type), D = as(D, type), delta_bias = as(delta_bias, type);
    if (type == ScalarType::Double) {
      u = as(u, type), delta = as(delta, type), B = as(B, type), C = as(C, type), z = as(z, type);
    } else {
      u = as_rows(u), delta = as_rows(delta), B = as_rows(B), C = as_rows(C), z = as_rows(z);
    }
  }

  float64::Scan exact() const {
    return {in<double>(u), in<double>(delta), in<double>(A),          in<double>(B), in<double>(C), in<double>(D),
            in<double>(z), in<double>(delta_bias), batch, tokens, channels, states, softplus};
  }

  Scan view(void* y, Float y_type) const {
    return {rows(u),      rows(delta),          rows(B), rows(C), rows(z), in<float>(A),
            in<float>(D), in<float>(delta_bias), y,       y_type,  batch,   tokens,
            channels,     states,               softplus};
  }
};

Tensor selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z, Optional bias,
                      bool softplus) {
  const ScanInputs s(u, delta, A, B, C, D, z, bias, softplus);
  Tensor y = make(s.u, {s.batch, s.tokens, s.channels}, s.u.scalar_type());
  if (s.type == ScalarType::Double) {
    float64::scan(s.exact(), out<double>(y));
  } else {
    const Scan q = s.view(y.mutable_data_ptr(), float_type(y));
    const auto run = kernels().scan;
    torch::stable::parallel_for(0, s.batch * groups(s.channels), 1,
                                [&](int64_t begin, int64_t end) { run(q, begin, end); });
  }
  return typed(y, u);
}

// (parts, …) → (…), in one order whatever the number of threads.
Tensor sum_first(const Tensor& x, Sizes sizes) {
  Tensor total = zeros(x, sizes, ScalarType::Float);
  const int64_t parts = x.size(0), count = total.numel();
  const float* from = in<float>(x);
  float* to = out<float>(total);
  torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < parts; part++) {
      for (int64_t i = begin; i < end; i++) to[i] += from[part * count + i];
    }
  });
  return total;
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Eight selective_scan_backward(Tensor grad, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z,
                              Optional bias, bool softplus) {
  const ScanInputs s(u, delta, A, B, C, D, z, bias, softplus);
  const ScalarType type = s.type;
  check_shape("grad", grad, {s.batch, s.tokens, s.channels});
  grad = as(grad, type);
  const bool exact = type == ScalarType::Double;
  const auto fresh = [&](Sizes sizes) { return exact ? zeros(s.u, sizes, type) : make(s.u, sizes, type); };
  Tensor du = fresh({s.batch, s.tokens, s.channels}), ddelta = fresh({s.batch, s.tokens, s.channels});
  const int64_t panels = divided_up(s.channels, PANEL);
  const auto mixing = [&] {
    return exact ? fresh({s.batch, s.tokens, s.states}) : fresh({panels, s.batch, s.tokens, s.states});
  };
  Tensor dB = mixing(), dC = mixing();
  Tensor dA = exact ? fresh({s.channels, s.states}) : fresh({s.batch, s.channels, s.states});
  const auto shared = [&](const Optional& x) {
    if (!x) return Optional();
    return Optional(exact ? fresh({s.channels}) : fresh({s.batch, s.channels}));
  };
  Optional dD = shared(D), dbias = shared(bias), dz;
  if (z) dz = fresh({s.batch, s.tokens, s.channels});
  if (exact) {
    const float64::Gradients to{out<double>(du), out<double>(ddelta), out<double>(dA), out<double>(dB), out<double>(dC),
                                out<double>(dD), out<double>(dz),     out<double>(dbias)};
    float64::scan_backward(s.exact(), in<double>(grad), to);
  } else {
    const ScanBackward q{s.view(nullptr, Float::f32),
                         in<float>(grad),
                         out<float>(du),
                         out<float>(ddelta),
                         out<float>(dA),
                         out<float>(dB),
                         out<float>(dC),
                         out<float>(dD),
                         out<float>(dz),
                         out<float>(dbias)};
    const auto run = kernels().scan_backward;
    torch::stable::parallel_for(0, s.batch * panels, 1, [&](int64_t begin, int64_t end) { run(q, begin, end); });
    dA = sum_first(dA, {s.channels, s.states});
    dB = sum_first(dB, {s.batch, s.tokens, s.states}), dC = sum_first(dC, {s.batch, s.tokens, s.states});
    if (dD) dD = sum_first(*dD, {s.channels});
    if (dbias) dbias = sum_first(*dbias, {s.channels});
  }
  const auto maybe = [&](const Optional& value, const Optional& original) {
    return value ? typed(*value, *original) : make(s.u, {0}, type);
  };
  return {typed(du, u), typed(ddelta, delta), typed(dA, A),  typed(dB, B),
          typed(dC, C), maybe(dD, D),         maybe(dz, z), maybe(dbias, bias)};
}


int64_t check_bits(int64_t bits) {
  STD_TORCH_CHECK(2 <= bits && bits <= 8, "bits must be between 2 and 8, got ", bits);
  return int64_t{1} << (bits - 1);
}

struct DirectionalInputs {
  Tensor u, projected, inv_scale, scale, zero_point, weight, weight_sum, weight_scale, bias, A, order;
  Optional inv_smooth, D, z;
  DirectionalScan scan;

  DirectionalInputs(const Tensor& u_, const Tensor& projected_, const Tensor& inv_scale_, const Tensor& scale_,
                    const Tensor& zero_point_, const Optional& inv_smooth_, int64_t bits, const Tensor& weight_,
                    const Tensor& weight_sum_, const Tensor& weight_scale_, const Tensor& bias_, const Tensor& A_,
                    const Optional& D_, const Optional& z_, const Tensor& order_, bool merge, double factor) {
    STD_TORCH_CHECK(u_.dim() == 4 && projected_.dim() == 4, "u must be (K, B, L, E) and projected (K, B, L, R + 2 S)");
    STD_TORCH_CHECK(A_.dim() == 3 && order_.dim() == 2, "A must be (K, E, S) and order (K, T)");
    const int64_t K = order_.size(0), batch = u_.size(1), tokens = u_.size(2), channels = u_.size(3);
    const int64_t states = A_.size(2), rank = projected_.size(3) - 2 * states;
    const int64_t scales = inv_scale_.dim() == 2 ? inv_scale_.size(1) : 0, half = check_bits(bits);
    STD_TORCH_CHECK(u_.size(0) == K || u_.size(0) == 1, "u has ", u_.size(0), " directions, the order ", K);
    STD_TORCH_CHECK(1 <= rank && rank <= 512, "projected has ", projected_.size(3), " channels: with ", states,
                    " states that leaves ", rank, " for the step, which must be between 1 and 512");
    STD_TORCH_CHECK(scales == tokens || scales == 1, "the step's scales were calibrated for ", scales,
                    " tokens, the input has ", tokens, "; calibrate at this resolution or use Granularity.PER_TENSOR");
    const bool packed = weight_.scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(packed || weight_.scalar_type() == ScalarType::Char,
                    "step_weight must be int8, or uint8 with two 4-bit codes a byte");
    check_shape("projected", projected_, {K, batch, tokens, rank + 2 * states});
    check_shape("step_inv_scale", inv_scale_, {K, scales});
    check_shape("step_scale", scale_, {K, scales});
    check_shape("step_zero_point", zero_point_, {K, scales});
    check_shape("step_inv_smooth", inv_smooth_, {K, rank});
    check_shape("step_weight", weight_, {K, groups(channels), divided_up(rank, 64), 16, packed ? 32 : 64});
    check_shape("step_weight_sum", weight_sum_, {K, channels});
    check_shape("step_weight_scale", weight_scale_, {K, channels});
    check_shape("step_bias", bias_, {K, channels});
    check_shape("A", A_, {K, channels, states});
    check_shape("D", D_, {K, channels});
    check_shape("z", z_, {batch, tokens, channels});
    u = as_rows(u_), z = as_rows(z_);
    projected = as(projected_, ScalarType::Float), inv_scale = as(inv_scale_, ScalarType::Float);
    scale = as(scale_, ScalarType::Float), zero_point = as(zero_point_, ScalarType::Int);
    inv_smooth = as(inv_smooth_, ScalarType::Float), weight = torch::stable::contiguous(weight_);
    weight_sum = as(weight_sum_, ScalarType::Int), weight_scale = as(weight_scale_, ScalarType::Float);
    bias = as(bias_, ScalarType::Float), A = as(A_, ScalarType::Float), D = as(D_, ScalarType::Float);
    order = as(order_, ScalarType::Int);
    const int32_t* read = in<int32_t>(order);
    const bool inside = std::all_of(read, read + order.numel(), [&](int32_t t) { return -1 <= t && t < tokens; });
    STD_TORCH_CHECK(inside, "the order names tokens that are not between -1 and ", tokens - 1);

    scan.u = rows(u), scan.z = rows(z), scan.u_direction = u.size(0) > 1 ? u.stride(0) : 0;
    scan.projected = in<float>(projected);
    scan.step = {in<float>(inv_scale),   in<int32_t>(zero_point),  in<float>(inv_smooth), scales,
                 static_cast<int>(-half), static_cast<int>(half - 1)};
    scan.step_scale = in<float>(scale);
    scan.step_weight = weight.const_data_ptr(), scan.packed = packed;
    scan.step_weight_sum = in<int32_t>(weight_sum), scan.step_weight_scale = in<float>(weight_scale);
    scan.step_bias = in<float>(bias), scan.A = in<float>(A), scan.D = in<float>(D), scan.order = in<int32_t>(order);
    scan.directions = K, scan.batch = batch, scan.tokens = tokens, scan.steps = order.size(1);
    scan.channels = channels, scan.rank = rank, scan.states = states;
    scan.factor = static_cast<float>(factor), scan.merge = merge;
  }

  // Panels' sums stay in the second cache, and there are equally many panels for every thread.
  void run() {
    constexpr int64_t CACHED = 320 * 1024, SMALLEST = 64;  // floats; channels
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = std::clamp(CACHED / std::max<int64_t>(1, scan.tokens), SMALLEST, PANEL);
    int64_t panels = divided_up(scan.channels, most);
    while (panels < groups(scan.channels) && scan.batch * panels % threads) panels++;
    scan.panel = std::max<int64_t>(1, divided_up(groups(scan.channels), std::max<int64_t>(1, panels))) * LANES;
    const auto one = kernels().directional_scan;
    torch::stable::parallel_for(0, scan.batch * divided_up(scan.channels, scan.panel), 1,
                                [&](int64_t begin, int64_t end) { one(scan, begin, end); });
  }
};

Tensor directional_scan(Tensor u, Tensor projected, Tensor step_inv_scale, Tensor step_scale, Tensor step_zero_point,
                        Optional step_inv_smooth, int64_t step_bits, Tensor step_weight, Tensor step_weight_sum,
                        Tensor step_weight_scale, Tensor step_bias, Tensor A, Optional D, Optional z, Tensor order,
                        bool merge, double factor) {
  DirectionalInputs s(u, projected, step_inv_scale, step_scale, step_zero_point, step_inv_smooth, step_bits,
                      step_weight, step_weight_sum, step_weight_scale, step_bias, A, D, z, order, merge, factor);
  const DirectionalScan& q = s.scan;
  Tensor y = merge ? make(s.u, {q.batch, q.tokens, q.channels}, s.u.scalar_type())
                   : make(s.u, {q.directions, q.batch, q.tokens, q.channels}, s.u.scalar_type());
  s.scan.y = y.mutable_data_ptr(), s.scan.y_type = float_type(y), s.scan.codes = nullptr;
  s.run();
  return typed(y, u);
}

Tensor directional_scan_quantize(Tensor u, Tensor projected, Tensor step_inv_scale, Tensor step_scale,
                                 Tensor step_zero_point, Optional step_inv_smooth, int64_t step_bits,
                                 Tensor step_weight, Tensor step_weight_sum, Tensor step_weight_scale,
                                 Tensor step_bias, Tensor A, Optional D, Optional z, Tensor order, double factor,
                                 Tensor inv_scale, Tensor zero_point, Optional inv_smooth, int64_t bits) {
  DirectionalInputs s(u, projected, step_inv_scale, step_scale, step_zero_point, step_inv_smooth, step_bits,
                      step_weight, step_weight_sum, step_weight_scale, step_bias, A, D, z, order, true, factor);
  DirectionalScan& q = s.scan;
  const int64_t half = check_bits(bits), scales = inv_scale.numel();
  STD_TORCH_CHECK(scales == q.tokens || scales == 1, "token scales were calibrated for ", scales,
                  " tokens, the input has ", q.tokens, "; calibrate at this resolution or use Granularity.PER_TENSOR");
  check_shape("inv_scale", inv_scale, {scales});
  check_shape("zero_point", zero_point, {scales});
  check_shape("inv_smooth", inv_smooth, {q.channels});
  inv_scale = as(inv_scale, ScalarType::Float), zero_point = as(zero_point, ScalarType::Int);
  inv_smooth = as(inv_smooth, ScalarType::Float);
  Tensor codes = make(s.u, {q.batch, q.tokens, q.channels}, ScalarType::Char);
  q.codes = out<int8_t>(codes), q.y = nullptr;
  q.qparams = {in<float>(inv_scale),   in<int32_t>(zero_point),  in<float>(inv_smooth), scales,
               static_cast<int>(-half), static_cast<int>(half - 1)};
  s.run();
  return codes;
}

}  // namespace
}  // namespace ptq4vm

STABLE_TORCH_LIBRARY_IMPL(ptq4vm, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&ptq4vm::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&ptq4vm::selective_scan_backward));
  m.impl("directional_scan", TORCH_BOX(&ptq4vm::directional_scan));
  m.impl("directional_scan_quantize", TORCH_BOX(&ptq4vm::directional_scan_quantize));
}
