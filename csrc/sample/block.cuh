// What the block that finishes a row of sample works with: its shared memory, the row's scores.
#pragma once

#include "core/order.cuh"
#include "core/reduce.cuh"
#include "core/rows.cuh"
#include "core/select.cuh"
#include "sample/sample.h"

namespace arfast {

constexpr int kSampleThreads = 256;
constexpr int kSampleSurvivors = 512;  // of top_k, ties with the last included, that are drawn from without the row

struct SampleSmem {
  SelectStorage<kSampleThreads> select;
  uint64_t ranks[kSampleSurvivors];
  uint64_t weights[kSampleSurvivors];
  unsigned long long sums[256];
  unsigned low[256], high[256];  // halves of sums that many threads add to
  uint64_t chosen;               // of all threads one writes it
  uint64_t before;
  int num_survivors;
  bool is_last;
};

// The scores of a row, and how tokens rank and weigh by them.
struct SampleScores {
  float temperature;
  float best;

  __device__ float score(float x) const {
    const float s = __fdiv_rn(x, temperature);
    return s == s ? s : -INFINITY;
  }
  __device__ float distance(float score) const { return score == best ? 0.0f : best - score; }
  __device__ uint64_t rank(float score, int64_t token) const {
    return rank_of(distance(score), order_of(score), token);
  }
  __device__ uint64_t weight(float score) const { return weight_of(distance(score)); }
};

// Adds to a sum in shared memory in 32-bit halves: 64-bit atomic additions there retry until nobody interferes, and all
// tokens of a row may be in one sum.
__device__ inline void add_halves(unsigned& low, unsigned& high, uint64_t value) {
  const unsigned addend = static_cast<unsigned>(value);
  const unsigned carry = atomicAdd(&low, addend) > 0xffffffffu - addend;
  const unsigned rest = static_cast<unsigned>(value >> 32) + carry;
  if (rest != 0) atomicAdd(&high, rest);
}

// sum over i < count of values(i) where condition(i), by every thread alone.
template <typename Condition, typename Values>
__device__ uint64_t sum_where(int count, const Condition& condition, const Values& values) {
  uint64_t sum = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) sum += condition(i) ? values(i) : 0;
  return sum;
}

}  // namespace arfast
