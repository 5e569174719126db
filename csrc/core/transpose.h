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

}  // namespace arfast::ARFAST_CPU_TARGET
