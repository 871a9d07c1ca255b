// CUDA on the CPU, as far as our kernels use it: with this folder before the toolkit's, g++ compiles the same .cu files
// (g++ -x c++ -std=c++17 -Itests/emulated/include). A thread is a fiber; one operating system's thread runs them in
// turn. What a GPU may do to a wrong kernel happens here on purpose:
// - shared memory is poisoned with NaN before every block, so that a read before the write shows;
// - threads run in an order that changes at every barrier, and a warp as far ahead of the others as it may, so that a
//   missing barrier shows;
// - a barrier, shuffle or vote that not all its threads reach aborts, and so does a launch that a GPU refuses.
// Kernels say PTQ4VM_SHARED and PTQ4VM_DYNAMIC_SHARED (device.cuh) for shared memory, and PTQ4VM_LAUNCH for <<<>>>.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#ifdef PTQ4VM_TOOLKIT_TYPES  // for CUTLASS, which includes the toolkit's headers: its types are theirs
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#endif

#define PTQ4VM_EMULATOR
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

#ifndef PTQ4VM_TOOLKIT_TYPES
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define PTQ4VM_VECTORS(T, name)                              \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
PTQ4VM_VECTORS(float, float)
PTQ4VM_VECTORS(int, int)
PTQ4VM_VECTORS(unsigned, uint)
PTQ4VM_VECTORS(signed char, char)
PTQ4VM_VECTORS(unsigned char, uchar)
PTQ4VM_VECTORS(short, short)
PTQ4VM_VECTORS(unsigned short, ushort)
#undef PTQ4VM_VECTORS

using cudaStream_t = struct CUstream_st*;
#endif

namespace ptq4vm::emulator {

constexpr int WARP = 32, MAX_THREADS = 1024;
constexpr size_t MAX_SHARED = 227 << 10, STACK = 128 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

enum class Wait { none, warp, block };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = true;
  Wait wait = Wait::none;
  unsigned mask = 0;                // of the lanes that it waits with
  uint64_t offered = 0, given = 0;  // what it brings to a rendezvous, and what others see after it
};

struct Machine {
  std::vector<Fiber> fibers{MAX_THREADS};
  ucontext_t scheduler;
  std::function<void()> body;
  int threads = 0, current = 0;
  uint32_t random = 1;
  std::map<const void*, std::vector<char>> shared;
  std::vector<char> dynamic;
  std::vector<const void*> streams;  // of the launches so far

  static Machine& get() {
    static Machine machine;
    return machine;
  }
};

inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;

inline void run_body() {
  Machine& m = Machine::get();
  m.body();
  m.fibers[m.current].done = true;
  swapcontext(&m.fibers[m.current].context, &m.scheduler);
}

inline void park(Wait wait) {
  Machine& m = Machine::get();
  Fiber& self = m.fibers[m.current];
  self.wait = wait;
  swapcontext(&self.context, &m.scheduler);
}

inline void run_one(Machine& m, int thread) {
  m.current = thread;
  const unsigned t = thread;
  thread_index = {t % block_size.x, t / block_size.x % block_size.y, t / (block_size.x * block_size.y)};
  swapcontext(&m.scheduler, &m.fibers[thread].context);
}

// Lets the lanes of a warp go on that have all come to the same rendezvous. Whether there were any.
inline bool release_warp(Machine& m, int warp) {
  bool any = false;
  const int lanes = std::min(WARP, m.threads - warp);
  for (int lane = 0; lane < lanes; lane++) {
    Fiber& first = m.fibers[warp + lane];
    if (first.done || first.wait != Wait::warp) continue;
    const unsigned mask = lanes == WARP ? first.mask : first.mask & ((1u << lanes) - 1);
    bool all = true;
    for (int i = 0; i < lanes; i++) {
      const Fiber& f = m.fibers[warp + i];
      if (mask >> i & 1) all = all && !f.done && f.wait == Wait::warp && f.mask == first.mask;
    }
    if (!all) continue;
    for (int i = 0; i < lanes; i++) {
      Fiber& f = m.fibers[warp + i];
      if (mask >> i & 1) f.wait = Wait::none, f.given = f.offered;
    }
    any = true;
  }
  return any;
}

inline uint32_t next_random(Machine& m) {
  m.random = m.random * 1664525u + 1013904223u;
  return m.random >> 12;
}

// Every thread runs until it waits for the block or ends, in an order that no kernel may rely on. Either each warp runs
// ahead as far as it comes, or all go from rendezvous to rendezvous together: each shows races that the other hides.
inline void run_all(Machine& m) {
  int power = WARP;
  while (power < m.threads) power *= 2;
  const bool ahead = next_random(m) & 1;
  bool released;
  do {
    released = false;
    const int flip = static_cast<int>(next_random(m)) & (power - 1);
    for (int first = 0; first < power; first += WARP) {
      const int warp = first ^ (flip & -WARP);
      if (warp >= m.threads) continue;
      bool again;
      do {
        for (int i = 0; i < WARP; i++) {
          const int t = warp + (i ^ (flip & (WARP - 1)));
          if (t < m.threads && !m.fibers[t].done && m.fibers[t].wait == Wait::none) run_one(m, t);
        }
        again = release_warp(m, warp);
        released = released || again;
      } while (ahead && again);
    }
  } while (released);
}

inline bool release_block(Machine& m) {
  for (int t = 0; t < m.threads; t++) {
    if (m.fibers[t].done || m.fibers[t].wait != Wait::block) return false;
  }
  for (int t = 0; t < m.threads; t++) m.fibers[t].wait = Wait::none;
  return true;
}

inline void run_block(Machine& m) {
  for (auto& array : m.shared) std::fill(array.second.begin(), array.second.end(), '\xff');
  std::fill(m.dynamic.begin(), m.dynamic.end(), '\xff');
  for (int t = 0; t < m.threads; t++) {
    Fiber& f = m.fibers[t];
    if (!f.stack) f.stack.reset(new char[STACK]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    f.done = false, f.wait = Wait::none;
    makecontext(&f.context, run_body, 0);
  }
  do {
    run_all(m);
  } while (release_block(m));
  for (int t = 0; t < m.threads; t++) {
    if (!m.fibers[t].done) fail("not all threads of a barrier, shuffle or vote reached it");
  }
}

template <class Body>
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const void* stream, Body body) {
  Machine& m = Machine::get();
  m.streams.push_back(stream);
  m.threads = block.x * block.y * block.z;
  if (m.threads < 1 || m.threads > MAX_THREADS) fail("a block has 1 to 1024 threads");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("the grid is too large");
  if (shared_bytes > MAX_SHARED) fail("too much dynamic shared memory");
  block_size = block, grid_size = grid;
  m.body = body;
  m.shared.clear();
  std::vector<char>(shared_bytes).swap(m.dynamic);
  for (block_index.z = 0; block_index.z < grid.z; block_index.z++) {
    for (block_index.y = 0; block_index.y < grid.y; block_index.y++) {
      for (block_index.x = 0; block_index.x < grid.x; block_index.x++) run_block(m);
    }
  }
}

// The array that belongs to `key`, the same for all threads of a block.
template <class T>
T& shared(const void* key) {
  auto& array = Machine::get().shared[key];
  if (array.empty()) array.assign(sizeof(T) + 16, '\xff');
  return *reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(array.data()) + 15) / 16 * 16);
}

template <class T>
void meet(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles take at most 8 bytes");
  Machine& m = Machine::get();
  Fiber& self = m.fibers[m.current];
  if (!(mask >> m.current % WARP & 1)) fail("a thread is not in the mask that it gives");
  self.mask = mask, self.offered = 0;
  std::memcpy(&self.offered, &value, sizeof(T));
  park(Wait::warp);
}

template <class T>
T shuffle(unsigned mask, T value, int source) {
  Machine& m = Machine::get();
  const int own = m.current, from = own / WARP * WARP + source;
  meet(mask, value);
  if (!(mask >> source & 1) || from >= m.threads) fail("a shuffle reads a lane that is not in its mask");
  T result;
  std::memcpy(&result, &m.fibers[from].given, sizeof(T));
  return result;
}

inline int lane() { return Machine::get().current % WARP; }

template <class To, class From>
To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace ptq4vm::emulator

// How many launches there were since the last call, and their streams.
extern "C" __attribute__((weak)) int ptq4vm_launches(const void** streams, int most) {
  auto& launches = ptq4vm::emulator::Machine::get().streams;
  const int count = static_cast<int>(launches.size());
  std::copy_n(launches.begin(), std::min(count, most), streams);
  launches.clear();
  return count;
}

#define threadIdx ptq4vm::emulator::thread_index
#define blockIdx ptq4vm::emulator::block_index
#define blockDim ptq4vm::emulator::block_size
#define gridDim ptq4vm::emulator::grid_size

[[noreturn]] inline void __trap() { ptq4vm::emulator::fail("a trap"); }
inline void __syncthreads() { ptq4vm::emulator::park(ptq4vm::emulator::Wait::block); }
inline void __syncwarp(unsigned mask = ~0u) { ptq4vm::emulator::meet(mask, 0); }

// `width` parts of a warp, as in CUDA: a lane whose source is outside its part keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = ptq4vm::emulator::lane() / width * width;
  return ptq4vm::emulator::shuffle(mask, value, first + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int own = ptq4vm::emulator::lane(), source = own ^ lanes;
  return ptq4vm::emulator::shuffle(mask, value, source / width > own / width ? own : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = ptq4vm::emulator::lane(), d = static_cast<int>(delta);
  return ptq4vm::emulator::shuffle(mask, value, own % width < d ? own : own - d);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = ptq4vm::emulator::lane(), d = static_cast<int>(delta);
  return ptq4vm::emulator::shuffle(mask, value, own % width + d >= width ? own : own + d);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  auto& m = ptq4vm::emulator::Machine::get();
  const int warp = m.current / 32 * 32;
  ptq4vm::emulator::meet(mask, predicate != 0);
  unsigned votes = 0;
  for (int i = 0; i < 32 && warp + i < m.threads; i++) {
    if (mask >> i & 1) votes |= static_cast<unsigned>(m.fibers[warp + i].given & 1) << i;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

using std::max;
using std::min;

template <class T>
T __ldg(const T* from) {
  return *from;
}

// Compile with -ffp-contract=off: then these round as the GPU does.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __log2f(float a) { return std::log2(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline int __float2int_rn(float a) {  // NaN is 0, and what is too large the largest
  if (!(a == a)) return 0;
  return static_cast<int>(std::min(2147483520.0f, std::max(-2147483648.0f, std::nearbyint(a))));
}
inline int __float_as_int(float a) { return ptq4vm::emulator::same_bits<int>(a); }
inline unsigned __float_as_uint(float a) { return ptq4vm::emulator::same_bits<unsigned>(a); }
inline float __int_as_float(int a) { return ptq4vm::emulator::same_bits<float>(a); }
inline float __uint_as_float(unsigned a) { return ptq4vm::emulator::same_bits<float>(a); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a ? __builtin_clz(a) : 32; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
