// Rotary position embedding of one head on the CPU (Su et al. 2021, arXiv 2104.09864, equation 34): channel i is paired
// with i + D / 2. Its GPU twin is rotation.cuh.
#pragma once

#include "core/simd.h"

namespace arfast::ARFAST_CPU_TARGET {

// A table vector in the type of the arithmetic on T.
template <typename T>
inline Vec<T> load_angle(const float* table, int count) {
  if constexpr (std::is_same_v<T, double>) {
    VecD v{};
    for (int lane = 0; lane < count; ++lane) v[lane] = table[lane];
    return v;
  } else {
    return load_lanes(table, count);
  }
}

// (a, b) -> (a cos - b sin, b cos + a sin) for the `half` pairs of x: [2 half] -> out [2 half]; inverse: rotated back.
template <typename T>
inline void rotate_head(const T* x, const float* cos, const float* sin, int64_t half, bool inverse, T* out) {
  for_each_vector<T>(half, [&](int64_t i, int count) {
    const Vec<T> c = load_angle<T>(cos + i, count), angle = load_angle<T>(sin + i, count);
    const Vec<T> s = inverse ? -angle : angle;
    const Vec<T> a = load_lanes(x + i, count), b = load_lanes(x + half + i, count);
    store_lanes(out + i, a * c - b * s, count);
    store_lanes(out + half + i, b * c + a * s, count);
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
