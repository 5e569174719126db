// What a thread, a block and a cluster know of a row of logits, and rows as aligned 16-byte vectors.
#pragma once

#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "core/vector.cuh"
#include "cross_entropy/cross_entropy.h"

namespace arfast {

__device__ inline float exp_approx(float x) { return ptx::exp2_approx(x * 1.44269504f); }

__device__ inline float capped(float z, float cap) { return cap > 0 ? cap * tanhf(z / cap) : z; }

// Some of a row's logits z'. `shift` is their maximum, or 0 when there is nothing but -inf: -inf - -inf would be NaN.
// What smoothing needs is summed relative to it, since sum w z' and W lse nearly cancel.
struct RowStatistics {
  float max = -INFINITY;
  float sum = 0;      // of exp(z' - shift)
  float shifted = 0;  // of w (z' - shift)
  float weight = 0;   // of w

  __device__ float shift() const { return max == -INFINITY ? 0.0f : max; }

  // sum of w (lse - z')
  __device__ float smoothing_loss(float log_sum) const { return weight * (max - shift() + log_sum) - shifted; }

  __device__ void raise(float new_max) {
    const float before = shift();
    max = new_max;
    const float step = before - shift();
    if (sum != 0) sum *= exp_approx(step);  // of the first shift, 0, the step may overflow: 0 * inf
    shifted += weight * step;
  }
};

// Rounded operation by operation: a contracted form would not give both lanes of an exchange the same bits.
__device__ inline RowStatistics combine(const RowStatistics& a, const RowStatistics& b) {
  RowStatistics out;
  out.max = fmaxf(a.max, b.max);
  const float step_a = a.shift() - out.shift(), step_b = b.shift() - out.shift();
  // An empty or fully masked part has a sum of 0 and a shift of 0, which may lie far above: 0 * inf would be NaN.
  const float scale_a = a.sum == 0 ? 0.0f : exp_approx(step_a), scale_b = b.sum == 0 ? 0.0f : exp_approx(step_b);
  out.sum = __fadd_rn(__fmul_rn(a.sum, scale_a), __fmul_rn(b.sum, scale_b));
  out.weight = a.weight + b.weight;
  out.shifted = __fadd_rn(__fadd_rn(a.shifted, __fmul_rn(a.weight, step_a)),  //
                          __fadd_rn(b.shifted, __fmul_rn(b.weight, step_b)));
  return out;
}

__device__ inline RowStatistics combine_warp(RowStatistics mine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    RowStatistics other;
    other.max = __shfl_xor_sync(0xffffffffu, mine.max, offset);
    other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, offset);
    other.shifted = __shfl_xor_sync(0xffffffffu, mine.shifted, offset);
    other.weight = __shfl_xor_sync(0xffffffffu, mine.weight, offset);
    mine = combine(mine, other);
  }
  return mine;
}

// Of all threads of the block, given to each; `of_warps` holds one entry per warp.
template <int kThreads>
__device__ RowStatistics combine_block(const RowStatistics& mine, RowStatistics* of_warps) {
  const RowStatistics of_warp = combine_warp(mine);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = of_warp;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  return combine_warp(lane < kThreads / kWarpSize ? of_warps[lane] : RowStatistics{});
}

// Of all blocks of the cluster, each of which has its own in `of_block`.
__device__ inline RowStatistics combine_cluster(const RowStatistics* of_block, int blocks) {
  RowStatistics theirs;
  const int lane = threadIdx.x % kWarpSize;
  if (lane < blocks) {
    const uint32_t address = ptx::map_to_rank(ptx::shared_address(of_block), lane);
    theirs.max = __uint_as_float(ptx::load_remote(address));
    theirs.sum = __uint_as_float(ptx::load_remote(address + 4));
    theirs.shifted = __uint_as_float(ptx::load_remote(address + 8));
    theirs.weight = __uint_as_float(ptx::load_remote(address + 12));
  }
  return combine_warp(theirs);
}

// Adds a vector of logits, whose first element stands in `first_column`; elements outside the row are passed over.
template <typename T>
__device__ inline void add_vector(const CrossEntropyParams& params, const Vector16<T>& logits, int64_t first_column,
                                  float cap, RowStatistics& statistics) {
  constexpr int kSize = Vector16<T>::kSize;
  const bool whole = first_column >= 0 && first_column + kSize <= params.vocab_size;
  const auto inside = [&](int i) { return whole || (first_column + i >= 0 && first_column + i < params.vocab_size); };
  float z[kSize];
  float max = statistics.max;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    z[i] = inside(i) ? capped(to_float(logits.elements[i]), cap) : -INFINITY;
    max = fmaxf(max, z[i]);
  }
  if (max > statistics.max) statistics.raise(max);
  const float shift = statistics.shift();
#pragma unroll
  for (int i = 0; i < kSize; ++i) statistics.sum += exp_approx(z[i] - shift);
  if (params.label_smoothing == 0) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (!inside(i)) continue;
    const float weight = params.weight != nullptr ? params.weight[first_column + i] : 1.0f;
    statistics.shifted += weight * (z[i] - shift);
    statistics.weight += weight;
  }
}

}  // namespace arfast
