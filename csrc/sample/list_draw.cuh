// Drawing from the lists of the parts' best tokens, when they hold all that top_k leaves. They are few, so that sums in
// the order of ranks or of tokens are taken by comparing each with each.
#pragma once

#include "sample/block.cuh"

namespace arfast {

// Collects what top_k leaves, in any order; false if tokens in no list may be among it, or if it is too much.
__device__ inline bool collect_survivors(const SampleParams& params, const uint64_t* lists, const TokenScores& scores,
                                         SampleSmem& smem) {
  const int64_t capacity = sample_listed(params), num_parts = sample_parts(params), total = num_parts * capacity;
  if (threadIdx.x == 0) {
    smem.chosen = 0;
    smem.num_survivors = 0;
  }
  select_largest<kSampleThreads>(
      params.filters.top_k,
      [&](const auto& f) {
        for (int64_t i = threadIdx.x; i < total; i += kSampleThreads) f(lists[i]);
      },
      [&](int64_t rank, uint64_t key) {
        if (rank == params.filters.top_k - 1) smem.chosen = key;
      },
      smem.select);
  __syncthreads();
  const float smallest = smem.chosen == 0 ? -INFINITY : scores.score(key_value(smem.chosen));
  for (int64_t i = threadIdx.x; i < total; i += kSampleThreads) {
    const uint64_t key = lists[i];
    if (key == 0) continue;
    const float score = scores.score(key_value(key));
    if (!(score >= smallest && score > -INFINITY)) continue;
    // The last of a full list stays: then smaller logits of its part may have the same score. So may larger tokens.
    const bool may_lack_ties = i % capacity == capacity - 1;
    const int slot = atomicAdd(&smem.num_survivors, may_lack_ties ? kSampleSurvivors + 1 : 1);
    if (slot >= kSampleSurvivors) continue;
    smem.ranks[slot] = scores.rank(score, key_index(key));
    smem.weights[slot] = scores.weight(score);
  }
  __syncthreads();
  return smem.num_survivors <= kSampleSurvivors;
}

// Leaves the token in smem.chosen; false: nothing is drawn.
__device__ inline bool draw_from_lists(const SampleParams& params, const uint64_t* lists, const int64_t* state,
                                       const TokenScores& scores, SampleSmem& smem) {
  if (!collect_survivors(params, lists, scores, smem)) return false;
  const int count = smem.num_survivors;
  const auto weight = [&](int i) { return smem.weights[i]; };
  const auto all = [](int) { return true; };
  const uint64_t limit = nucleus_limit(params.filters.top_p, sum_where(count, all, weight));
  uint64_t kept[kSampleSurvivors / kSampleThreads];
#pragma unroll
  for (int k = 0; k < kSampleSurvivors / kSampleThreads; ++k) {
    const int i = threadIdx.x + k * kSampleThreads;
    kept[k] = 0;
    if (i >= count || smem.weights[i] < params.filters.min_weight) continue;
    const uint64_t before = sum_where(count, [&](int j) { return smem.ranks[j] > smem.ranks[i]; }, weight);
    if (before < limit) kept[k] = smem.weights[i];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSampleSurvivors / kSampleThreads; ++k) {
    const int i = threadIdx.x + k * kSampleThreads;
    if (i < count) smem.weights[i] = kept[k];
  }
  __syncthreads();
  const uint64_t number = random_below(random_bits(state, params.state_column_stride), sum_where(count, all, weight));
  for (int i = threadIdx.x; i < count; i += kSampleThreads) {
    const int64_t token = token_in_rank(smem.ranks[i]);
    const uint64_t before = sum_where(count, [&](int j) { return token_in_rank(smem.ranks[j]) < token; }, weight);
    if (before <= number && number - before < smem.weights[i]) smem.chosen = static_cast<uint64_t>(token);
  }
  __syncthreads();
  return true;
}

}  // namespace arfast
