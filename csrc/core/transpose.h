// A square of vectors, transposed in registers.
#pragma once

#include <utility>

#include "core/simd.h"

namespace arfast::ARFAST_CPU_TARGET {

// One butterfly: of each pair of rows `Half` apart, exchanges the off-diagonal blocks of Half x Half.
template <int Half, typename V, int... Lane>
inline void exchange_blocks(V& low, V& high, std::integer_sequence<int, Lane...>) {
  constexpr int lanes = sizeof...(Lane);
  using Index = decltype(V{} > V{});
  const Index to_low = {(Lane & Half ? Lane - Half + lanes : Lane)...};
  const Index to_high = {(Lane & Half ? Lane + lanes : Lane + Half)...};
  const V new_low = __builtin_shuffle(low, high, to_low);
  high = __builtin_shuffle(low, high, to_high);
  low = new_low;
}

// rows[i][j] <-> rows[j][i]
template <typename V, int Half = 1>
inline void transpose(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  if constexpr (Half < lanes) {
    for (int i = 0; i < lanes; ++i) {
      if (!(i & Half)) exchange_blocks<Half>(rows[i], rows[i + Half], std::make_integer_sequence<int, lanes>());
    }
    transpose<V, 2 * Half>(rows);
  }
}

// Two vectors interleaved, a0 b0 a1 b1 ...: the vector of their lower and that of their upper halves.
template <typename V, size_t... kLane>
inline V interleave_low(V a, V b, std::index_sequence<kLane...>) {
  return __builtin_shuffle(a, b, decltype(V{} < V{}){(kLane / 2 + kLane % 2 * sizeof...(kLane))...});
}
template <typename V, size_t... kLane>
inline V interleave_high(V a, V b, std::index_sequence<kLane...>) {
  constexpr size_t kL = sizeof...(kLane);
  return __builtin_shuffle(a, b, decltype(V{} < V{}){(kL / 2 + kLane / 2 + kLane % 2 * kL)...});
}

// The vector whose lane i is rows[i] reduced over its lanes by f: the rounds of a transposition.
template <typename V, size_t kCount, typename F>
inline V reduce_transposed(const V (&rows)[kCount], const F& f) {
  if constexpr (kCount == 1) {
    return rows[0];
  } else {
    constexpr std::make_index_sequence<sizeof(V) / sizeof(rows[0][0])> kLane;
    V next[kCount / 2];
#pragma GCC unroll 8
    for (size_t i = 0; i < kCount / 2; ++i) {
      const V a = rows[i], b = rows[i + kCount / 2];
      next[i] = f(interleave_low(a, b, kLane), interleave_high(a, b, kLane));
    }
    return reduce_transposed(next, f);
  }
}
template <typename V, size_t kCount>
inline V add_transposed(const V (&rows)[kCount]) {
  return reduce_transposed(rows, [](const V& a, const V& b) { return a + b; });
}

}  // namespace arfast::ARFAST_CPU_TARGET
