// Online log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1) over threads and parts of a row.
#pragma once

#include "core/ptx.cuh"
#include "core/reduce.cuh"

namespace arfast {

struct LogSum {
  float max;
  float sum;  // of exp(x - max)
};

// e^(x - max). With the maximum at infinity, as with nothing but -infinity, the difference would be NaN.
__device__ inline float exp_below(float x, float max) {
  return x == max ? 1.0f : ptx::exp2_approx((x - max) * 1.44269504f);
}

__device__ inline LogSum combine(const LogSum& a, const LogSum& b) {
  const float max = fmaxf(a.max, b.max);
  return {max, __fadd_rn(__fmul_rn(a.sum, exp_below(a.max, max)), __fmul_rn(b.sum, exp_below(b.max, max)))};
}

__device__ inline LogSum combine_warp(LogSum mine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const LogSum other{__shfl_xor_sync(0xffffffffu, mine.max, offset), __shfl_xor_sync(0xffffffffu, mine.sum, offset)};
    mine = combine(mine, other);
  }
  return mine;
}

}  // namespace arfast
