// Shared by all kernels. The same text is CUDA under nvcc and C++ under the emulator (tests/emulated):
//   PTQ4VM_LAUNCH(kernel<float, 8>, grid, block, shared_bytes, stream, arguments...)   <<<>>>; nothing for an empty grid
//   PTQ4VM_SHARED(float, tile, [64][33]);            __shared__ float tile[64][33], 16-byte aligned
//   PTQ4VM_DYNAMIC_SHARED(float, row);               float* row: the shared_bytes of the launch; once in a kernel
//   with_type(q.x_type, [&](auto t) { using T = decltype(t); … });      T: float, bfloat16 or float16
//   load<8>(from, v), store<8>(to, v)                float v[8] from and to any T, in 16-byte accesses: `from` is aligned
//                                                    to 8 elements or 16 bytes, whichever is less (aligned<8>(from) tells)
//   to_float(x), from_float<T>(v)                    one number, rounded half to even
//   const RowQParams qparams(q.qparams, row, set);   the qparams of a row of a set of rows (a direction)
//   qparams.code(__fmul_rn(v, inv_smooth[d]))        ops.quantize of one smoothed number, bit for bit
//   store_codes<8>(to, codes)                        int codes[8] as 8 int8 in one access
//   write_codes<8>(to, v, inv_smooth + d, qparams)   float v[8] smoothed, quantized, stored; inv_smooth may be null
//   warp_sum(v), warp_reduce(v, combine)             over all 32 lanes, to all of them
//   block_sum<WARPS>(v, scratch)                     over a block of WARPS warps, to all threads, in one order
// PTX stands behind #ifdef __CUDA_ARCH__ with its twin in C++. No static state, no allocation, no synchronisation.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../operators.h"
#include "launch.h"

#ifdef PTQ4VM_EMULATOR
#define PTQ4VM_SHARED(T, name, dims) \
  typedef T name##_array dims;       \
  static const char name##_key = 0;  \
  name##_array& name = ::ptq4vm::emulator::shared<name##_array>(&name##_key)
#define PTQ4VM_DYNAMIC_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(::ptq4vm::emulator::Machine::get().dynamic.data())
#else
#define PTQ4VM_SHARED(T, name, dims) __shared__ __align__(16) T name dims
#define PTQ4VM_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char ptq4vm_dynamic[]; \
  T* const name = reinterpret_cast<T*>(ptq4vm_dynamic)
#endif
#define PTQ4VM_LAUNCH(...) ::ptq4vm::cuda::launch_kernel(__VA_ARGS__)

namespace ptq4vm::cuda {

constexpr int WARP_SIZE = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr size_t SHARED_WITHOUT_ASKING = 48 << 10;

// Returns whether a block of this device may have so much, which then is the kernel's.
template <class Kernel>
bool ask_for_shared(Kernel kernel, size_t bytes) {
#ifdef PTQ4VM_EMULATOR
  (void)kernel;
  return bytes <= ::ptq4vm::emulator::MAX_SHARED;
#else
  const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (cudaFuncSetAttribute(kernel, most, static_cast<int>(bytes)) == cudaSuccess) return true;
  cudaGetLastError();  // this one is reported here
  return false;
#endif
}

// Throws std::length_error where a block needs more shared memory than there is.
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
                   Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > SHARED_WITHOUT_ASKING && !ask_for_shared(kernel, shared_bytes)) {
    throw std::length_error("so many channels or states need " + std::to_string(shared_bytes) +
                            " bytes of shared memory, more than a block of this GPU has");
  }
#ifdef PTQ4VM_EMULATOR
  ::ptq4vm::emulator::run_grid(grid, block, shared_bytes, stream, [=] { kernel(arguments...); });
#else
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
#endif
}

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// A token of an order, which the host does not read: one below `least` or beyond the tokens stops the kernel before it
// reads or writes there, as an index of torch's would.
__device__ inline int32_t checked_token(int32_t token, int32_t least, int64_t tokens) {
  if (token < least || token >= tokens) __trap();
  return token;
}

// a % b; as 64 bits it would be a call of a hundred instructions for every row, and most numbers have 32.
__device__ inline int64_t remainder(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) % static_cast<uint32_t>(b);
  return a % b;
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class F>
void with_type(Float type, F f) {
  switch (type) {
    case Float::f32: return f(float{});
    case Float::bf16: return f(bfloat16{});
    case Float::f16: return f(float16{});
  }
}

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline float to_float(float16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const unsigned magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  const float finite = __uint_as_float(magnitude << 13) * 0x1p112f;
  return __uint_as_float(sign | (magnitude < 0x7c00 ? __float_as_uint(finite) : 0x7f800000u | magnitude << 13));
#endif
}

template <class T>
__device__ T from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
  return value;
}

template <>
__device__ inline bfloat16 from_float<bfloat16>(float value) {
#ifdef __CUDA_ARCH__
  bfloat16 x;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x.bits) : "f"(value));
  return x;
#else
  const unsigned bits = __float_as_uint(value);
  return {static_cast<uint16_t>(value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff)};
#endif
}

template <>
__device__ inline float16 from_float<float16>(float value) {
#ifdef __CUDA_ARCH__
  float16 x;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(value));
  return x;
#else
  const unsigned bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  unsigned half;
  if (magnitude > 0x7f800000)
    half = 0x7fff;
  else if (magnitude >= 0x477ff000)
    half = 0x7c00;  // from 65520 on
  else if (magnitude < 0x38800000)
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
  else
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>((bits >> 16 & 0x8000) | half)};
#endif
}

// N numbers in one access, or several of 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T values[N];
};

// Returns whether all accesses to vectors of N from this pointer on, at multiples of N, are aligned.
template <int N, class T>
bool aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Vector<T, N>) == 0;
}

template <int N, class T>
__device__ inline void load(const T* from, float (&to)[N]) {
  const Vector<T, N> vector = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = to_float(vector.values[i]);
}

template <int N, class T>
__device__ inline void store(T* to, const float (&from)[N]) {
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; i++) vector.values[i] = from_float<T>(from[i]);
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

template <int N>
__device__ inline void store_codes(int8_t* to, const int (&codes)[N]) {
  Vector<int8_t, N> vector;
#pragma unroll
  for (int i = 0; i < N; i++) vector.values[i] = static_cast<int8_t>(codes[i]);
  *reinterpret_cast<Vector<int8_t, N>*>(to) = vector;
}

// The qparams of a row, a token.
struct RowQParams {
  float inv_scale, low, high;  // bounds of the code less the zero point: one conversion rounds, and cannot overflow
  int zero_point;

  __device__ RowQParams(float inv, int zero, int least, int most)
      : inv_scale(inv), low(static_cast<float>(least) - static_cast<float>(zero)),
        high(static_cast<float>(most) - static_cast<float>(zero)), zero_point(zero) {}

  // The qparams of a row of a set.
  __device__ RowQParams(const QParams& q, int64_t row, int64_t set = 0) : RowQParams(q, at(q, row, set)) {}

  // The code of a value that is already smoothed. NaN has the code 0, as in torch.
  __device__ int code(float value) const {
    const float scaled = __fmul_rn(value, inv_scale);
    const int shifted = __float2int_rn(fminf(fmaxf(scaled, low), high)) + zero_point;
    return scaled == scaled ? shifted : 0;
  }

 private:
  struct Place {
    int64_t index;
  };

  __device__ static Place at(const QParams& q, int64_t row, int64_t set) {
    return {set * q.scales + remainder(row, q.scales)};
  }

  __device__ RowQParams(const QParams& q, Place at)
      : RowQParams(q.inv_scale[at.index], q.zero_point[at.index], q.low, q.high) {}
};

// The codes of N neighbours; `inv_smooth` is theirs, or null.
template <int N>
__device__ inline void write_codes(int8_t* to, const float (&value)[N], const float* inv_smooth,
                                   const RowQParams& qparams) {
  float smooth[N];
  int codes[N];
  if (inv_smooth) load<N>(inv_smooth, smooth);
#pragma unroll
  for (int i = 0; i < N; i++) codes[i] = qparams.code(inv_smooth ? __fmul_rn(value[i], smooth[i]) : value[i]);
  store_codes<N>(to, codes);
}

template <class T, class Combine>
__device__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int lanes = WARP_SIZE / 2; lanes > 0; lanes /= 2) {
    value = combine(value, __shfl_xor_sync(ALL_LANES, value, lanes));
  }
  return value;
}

template <class T>
__device__ T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

// The sum over a one-dimensional block of WARPS warps. `scratch` is shared memory for WARPS numbers; it may be used
// again at once.
template <int WARPS>
__device__ float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  if (WARPS == 1) return value;
  if (threadIdx.x % WARP_SIZE == 0) scratch[threadIdx.x / WARP_SIZE] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < WARPS; i++) total += scratch[i];
  __syncthreads();
  return total;
}

// x / 2 · (1 + erf(x / √2))
__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); }

// Within 3 + |x| units in the last place, which are small where x is far from zero.
__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

}  // namespace ptq4vm::cuda
