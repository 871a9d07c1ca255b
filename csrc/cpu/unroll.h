// Loops that are unrolled before arrays get their registers.
#pragma once

#include <utility>

namespace ptq4vm {
namespace {

// Calls work(n) for constants n below N. GCC unrolls a loop too late to keep an array in registers.
template <class Work, int... n>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, n...>, Work work) {
  (work(std::integral_constant<int, n>()), ...);
}

template <int N, class Work>
inline __attribute__((always_inline)) void unroll(Work work) {
  unrolled(std::make_integer_sequence<int, N>(), work);
}

}  // namespace
}  // namespace ptq4vm
