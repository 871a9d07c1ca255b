// Stands in for CUTLASS's header of this name on the CPU: mma.m16n8k32 of int8 and mma.m16n8k64 of nibbles, by all 32
// lanes of a warp, with operands where PTX says that they lie.
#pragma once

#include <cuda_runtime.h>

#include "cutlass/arch/mma.h"
#include "cutlass/gemm/gemm.h"

namespace cutlass {
namespace arch {

inline int LaneId() { return ptq4vm::emulator::lane(); }

template <class Code>
struct EmulatedMma {
  static constexpr int BITS = sizeof_bits<Code>::value, CODES = 32 / BITS;  // of a register
  using Shape = gemm::GemmShape<16, 8, 8 * CODES>;
  using ElementA = Code;
  using LayoutA = layout::RowMajor;
  using FragmentA = Array<Code, 4 * CODES>;
  using ElementB = Code;
  using LayoutB = layout::ColumnMajor;
  using FragmentB = Array<Code, 2 * CODES>;
  using ElementC = int;
  using LayoutC = layout::RowMajor;
  using FragmentC = Array<int, 4>;
  using Operator = OpMultiplyAddSaturate;
  using ArchTag = arch::Sm80;

  struct Operands {
    uint32_t a[4], b[2];
  };

  static int dot(uint32_t a, uint32_t b) {
    int sum = 0;
    for (int i = 0; i < 32; i += BITS) {
      sum += (static_cast<int32_t>(a << (32 - BITS - i)) >> (32 - BITS)) *
             (static_cast<int32_t>(b << (32 - BITS - i)) >> (32 - BITS));
    }
    return sum;
  }

  void operator()(FragmentC& d, const FragmentA& a, const FragmentB& b, const FragmentC& c) const {
    const Operands* all[32];
    Operands own;
    std::memcpy(own.a, &a, sizeof(own.a));
    std::memcpy(own.b, &b, sizeof(own.b));
    auto& machine = ptq4vm::emulator::Machine::get();
    const int lane = machine.current % 32, warp = machine.current - lane;
    ptq4vm::emulator::meet(~0u, &own);
    for (int i = 0; i < 32; i++) std::memcpy(&all[i], &machine.fibers[warp + i].given, sizeof(all[i]));
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4, half = i / 2, column = lane % 4 * 2 + i % 2;
      int64_t sum = c[i];
      for (int part = 0; part < 4; part++) {
        for (int r = 0; r < 2; r++) sum += dot(all[row * 4 + part]->a[half + 2 * r], all[column * 4 + part]->b[r]);
      }
      d[i] = static_cast<int>(std::min<int64_t>(INT32_MAX, std::max<int64_t>(INT32_MIN, sum)));
    }
    ptq4vm::emulator::meet(~0u, 0);  // until then others read this lane's operands
  }
};

template <>
struct Mma<gemm::GemmShape<16, 8, 32>, 32, int8_t, layout::RowMajor, int8_t, layout::ColumnMajor, int, layout::RowMajor,
           OpMultiplyAddSaturate> : EmulatedMma<int8_t> {};

template <>
struct Mma<gemm::GemmShape<16, 8, 64>, 32, int4b_t, layout::RowMajor, int4b_t, layout::ColumnMajor, int,
           layout::RowMajor, OpMultiplyAddSaturate> : EmulatedMma<int4b_t> {};

}  // namespace arch
}  // namespace cutlass
