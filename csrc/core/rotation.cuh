// Rotary position embedding of two vectors on the GPU (Su et al. 2021, arXiv 2104.09864, equation 34): channel i is
// paired with i + D / 2. Its CPU twin is rotation.h.
#pragma once

#include "core/vector.cuh"

namespace arfast {

// (a, b) -> (a cos - b sin, b cos + a sin). The order of rounding is spelled out: every kernel gives the same bits.
template <typename T>
__device__ void rotate(Vector16<T>& a, Vector16<T>& b, const float (&cos)[Vector16<T>::kSize],
                       const float (&sin)[Vector16<T>::kSize]) {
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) {
    const float x = to_float(a.elements[i]), y = to_float(b.elements[i]);
    a.elements[i] = from_float<T>(fmaf(x, cos[i], -(y * sin[i])));
    b.elements[i] = from_float<T>(fmaf(y, cos[i], x * sin[i]));
  }
}

}  // namespace arfast
