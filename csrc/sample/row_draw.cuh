// Drawing from a whole row, by one block that reads it several times: where top_k and top_p cut is found digit by digit
// of the tokens' ranks, from sums per value of the digit.
#pragma once

#include "sample/block.cuh"

namespace arfast {

// Calls f(score, token) for the tokens of the calling thread that have one above -infinity.
template <typename T, typename F>
__device__ void for_each_score(const RowOf<const T>& row, const SampleScores& scores, const F& f) {
  constexpr int kBatch = 16 / Vector16<T>::kSize;  // loads on their way together
  for (int64_t first = threadIdx.x; first < row.num_vectors(); first += kBatch * kSampleThreads) {
    Vector16<T> held[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * kSampleThreads < row.num_vectors()) held[k] = row.load(first + k * kSampleThreads);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t j = first + k * kSampleThreads;
      if (j >= row.num_vectors()) break;
#pragma unroll
      for (int i = 0; i < Vector16<T>::kSize; ++i) {
        const float score = scores.score(to_float(held[k].elements[i]));
        if (score > -INFINITY) f(score, row.column(j) + i);
      }
    }
  }
}

// Among the tokens with a rank of at least `smallest`, the rank of the first one, in their order, at which the running
// sum of measure(score) reaches limit_of(sum of all); 0 if none does. With `whole_ties` the smallest rank with its
// score.
template <typename T, typename Measure, typename Limit>
__device__ uint64_t rank_at(const RowOf<const T>& row, const SampleScores& scores, uint64_t smallest, bool whole_ties,
                            const Measure& measure, const Limit& limit_of, SampleSmem& smem) {
  uint64_t rank = 0, missing = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    smem.low[threadIdx.x] = smem.high[threadIdx.x] = 0;
    __syncthreads();
    const uint64_t settled = shift == 56 ? 0 : ~uint64_t{0} << (shift + 8);  // digits
    for_each_score(row, scores, [&](float score, int64_t token) {
      const uint64_t other = scores.rank(score, token);
      if (other < smallest || ((other ^ rank) & settled) != 0) return;
      const int digit = static_cast<int>(other >> shift & 255);
      add_halves(smem.low[digit], smem.high[digit], measure(score));
    });
    __syncthreads();
    smem.sums[threadIdx.x] = uint64_t{smem.high[threadIdx.x]} << 32 | smem.low[threadIdx.x];
    __syncthreads();
    const auto sum = [&](int digit) { return static_cast<uint64_t>(smem.sums[digit]); };
    if (shift == 56) {
      const uint64_t all = sum_where(256, [](int) { return true; }, sum);
      missing = limit_of(all);
      if (all < missing) return 0;
    }
    const int mine = threadIdx.x;
    const uint64_t before = sum_where(256, [&](int digit) { return digit > mine; }, sum);
    if (before < missing && missing - before <= sum(mine)) {
      smem.chosen = static_cast<uint64_t>(mine);
      smem.before = before;
    }
    __syncthreads();
    rank |= smem.chosen << shift;
    missing -= smem.before;
    if (shift == 24) {
      // All ties are wanted, or the last one of them is.
      const uint64_t each = measure(from_order(order_in_rank(rank)));
      if (whole_ties || missing > sum(static_cast<int>(smem.chosen)) - each) return rank;
    }
  }
  return rank;
}

// The smallest rank that the filters keep, but for min_p.
template <typename T>
__device__ uint64_t smallest_kept_rank(const SampleParams& params, const RowOf<const T>& row,
                                       const SampleScores& scores, SampleSmem& smem) {
  uint64_t smallest = 0;
  if (params.filters.top_k > 0 && params.filters.top_k < params.vocab_size) {
    const auto limit = [&](uint64_t) { return static_cast<uint64_t>(params.filters.top_k); };
    const auto one = [](float) { return uint64_t{1}; };
    smallest = rank_at(row, scores, 0, true, one, limit, smem);
    __syncthreads();
  }
  if (params.filters.top_p < 1) {
    const auto limit = [&](uint64_t mass) { return nucleus_limit(params.filters.top_p, mass); };
    const auto weight = [&](float score) { return scores.weight(score); };
    smallest = rank_at(row, scores, smallest, false, weight, limit, smem);
    __syncthreads();
  }
  return smallest;
}

// Leaves the token in smem.chosen: first its segment of 1/256 of the row is found, then the token in it.
template <typename T>
__device__ void draw_from_row(const SampleParams& params, const T* logits, const int64_t* state,
                              const SampleScores& scores, SampleSmem& smem) {
  const RowOf<const T> row(logits, params.vocab_size);
  const uint64_t smallest = smallest_kept_rank(params, row, scores, smem);
  const auto kept_weight = [&](int64_t token) {
    const float score = scores.score(to_float(logits[token]));
    if (!(score > -INFINITY) || scores.rank(score, token) < smallest) return uint64_t{0};
    const uint64_t weight = scores.weight(score);
    return weight < params.filters.min_weight ? uint64_t{0} : weight;
  };
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t size = (params.vocab_size + 255) / 256;
  for (int segment = warp; segment < 256; segment += kSampleThreads / kWarpSize) {
    const int64_t end = min((segment + 1) * size, params.vocab_size);
    uint64_t sum = 0;
#pragma unroll 4
    for (int64_t token = segment * size + lane; token < end; token += kWarpSize) sum += kept_weight(token);
    sum = warp_inclusive_sum(sum);
    if (lane == kWarpSize - 1) smem.sums[segment] = sum;
  }
  __syncthreads();
  const auto sum = [&](int segment) { return static_cast<uint64_t>(smem.sums[segment]); };
  const uint64_t mass = sum_where(256, [](int) { return true; }, sum);
  const uint64_t number = random_below(random_bits(state, params.state_column_stride), mass);
  const int mine = threadIdx.x;
  const uint64_t before_mine = sum_where(256, [&](int segment) { return segment < mine; }, sum);
  if (before_mine <= number && number - before_mine < sum(mine)) {
    smem.chosen = static_cast<uint64_t>(mine);
    smem.before = before_mine;
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(smem.chosen) * size, end = min(first + size, params.vocab_size);
  uint64_t before = smem.before;
  __syncthreads();  // smem.chosen has been read
  if (warp != 0) return;
  for (int64_t base = first; base < end; base += kWarpSize) {
    const int64_t token = base + lane;
    const uint64_t upto = before + warp_inclusive_sum(token < end ? kept_weight(token) : 0);
    const unsigned beyond = __ballot_sync(0xffffffffu, upto > number);
    if (beyond != 0) {
      if (lane == __ffs(static_cast<int>(beyond)) - 1) smem.chosen = static_cast<uint64_t>(token);
      return;
    }
    before = __shfl_sync(0xffffffffu, upto, kWarpSize - 1);
  }
}

}  // namespace arfast
