// What threads, warps and blocks know of a row of logits, and how it adds up.
#pragma once

#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "core/rows.cuh"
#include "cross_entropy/ring.h"

namespace arfast {

__device__ inline float exp_approx(float x) { return ptx::exp2_approx(x * 1.44269504f); }

__device__ inline float capped(float z, float cap) { return cap > 0 ? cap * tanhf(z / cap) : z; }

// A vector's logits z'. What is the same for all elements is asked once: nearly all calls have no options and no edge.
template <typename T>
__device__ __forceinline__ void capped_logits(const Vector16<T>& logits, float cap, float (&z)[Vector16<T>::kSize]) {
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) z[i] = to_float(logits.elements[i]);
  if (cap > 0) {
#pragma unroll
    for (int i = 0; i < Vector16<T>::kSize; ++i) z[i] = capped(z[i], cap);
  }
}

// Some of a row's logits z'. `shift` is their maximum, or 0 when there is nothing but -inf: -inf - -inf would be NaN.
// What smoothing needs is summed relative to it, since sum w z' and W lse nearly cancel.
struct alignas(16) RowStatistics {
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

  __device__ void add(RowStatistics other) {
    const float new_max = fmaxf(max, other.max);
    raise(new_max);
    other.raise(new_max);
    sum += other.sum;
    shifted += other.shifted;
    weight += other.weight;
  }
};

// Of all lanes, given to each.
__device__ inline RowStatistics combine_warp(RowStatistics mine) {
  mine.raise(warp_max(mine.max));
  mine.sum = warp_sum(mine.sum);
  mine.shifted = warp_sum(mine.shifted);
  mine.weight = warp_sum(mine.weight);
  return mine;
}

// Of `count` entries, given to every lane of the warp that calls it; in a fixed order.
__device__ inline RowStatistics combine_entries(const RowStatistics* entries, int count) {
  RowStatistics mine;
  for (int i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) mine.add(entries[i]);
  return combine_warp(mine);
}

// Of all threads of the block, given to each; `of_warps` holds one entry per warp.
template <int kThreads>
__device__ RowStatistics combine_block(const RowStatistics& mine, RowStatistics* of_warps) {
  const RowStatistics of_warp = combine_warp(mine);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = of_warp;
  __syncthreads();
  return combine_entries(of_warps, kThreads / kWarpSize);
}

// Adds a vector of logits, whose first element stands in `first_column`; elements outside the row are passed over.
template <typename T>
__device__ inline void add_vector(const CrossEntropyParams& params, const Vector16<T>& logits, int64_t first_column,
                                  RowStatistics& statistics) {
  constexpr int kSize = Vector16<T>::kSize;
  const bool whole = first_column >= 0 && first_column + kSize <= params.vocab_size;
  const auto inside = [&](int i) { return first_column + i >= 0 && first_column + i < params.vocab_size; };
  float z[kSize];
  capped_logits(logits, static_cast<float>(params.softcap), z);
  if (!whole) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) z[i] = inside(i) ? z[i] : -INFINITY;
  }
  float max = statistics.max;
#pragma unroll
  for (int i = 0; i < kSize; ++i) max = fmaxf(max, z[i]);
  if (max > statistics.max) statistics.raise(max);
  const float shift = statistics.shift();
#pragma unroll
  for (int i = 0; i < kSize; ++i) statistics.sum += exp_approx(z[i] - shift);
  if (params.label_smoothing == 0) return;
  if (whole && params.weight == nullptr) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) statistics.shifted += z[i] - shift;
    statistics.weight += kSize;
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (!inside(i)) continue;
    const float weight = params.weight != nullptr ? params.weight[first_column + i] : 1.0f;
    statistics.shifted += weight * (z[i] - shift);
    statistics.weight += weight;
  }
}

// A thread's share of a row: vectors first, first + kStep, ... below `last`, kept in registers.
template <typename T, int kStep>
struct HeldVectors {
  int first, last;
  Vector16<T> vectors[kHeldVectors];

  // f(vector, its number)
  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) {
#pragma unroll
    for (int k = 0; k < kHeldVectors; ++k) {
      if (k * kStep < last - first) f(vectors[k], first + k * kStep);
    }
  }
};

// The logit of the target, for the one thread that holds it.
struct TargetLogit {
  bool held = false;
  float z = 0;

  template <typename T>
  __device__ void look_in(const Vector16<T>& logits, int64_t first_column, int64_t target) {
    const int64_t at = target - first_column;
    if (at < 0 || at >= Vector16<T>::kSize) return;
    held = true;
#pragma unroll
    for (int i = 0; i < Vector16<T>::kSize; ++i) z = i == at ? to_float(logits.elements[i]) : z;
  }
};

// Adds the vectors that a thread holds of row `in`, and looks for the target among them.
template <typename T, int kStep>
__device__ __forceinline__ RowStatistics held_statistics(const CrossEntropyParams& params, const RowOf<const T>& in,
                                                         int64_t target, HeldVectors<T, kStep>& mine,
                                                         TargetLogit& of_target) {
  RowStatistics statistics;
  mine.for_each([&](const Vector16<T>& logits, int j) {
    add_vector(params, logits, in.column(j), statistics);
    of_target.look_in(logits, in.column(j), target);
  });
  return statistics;
}

}  // namespace arfast
