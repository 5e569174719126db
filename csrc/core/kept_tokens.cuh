// Which tokens of a row temperature, top_k, top_p and min_p keep, and drawing from them, by one block that reads the
// row several times: where top_k and top_p cut is found digit by digit of the tokens' ranks, from sums per value of the
// digit.
#pragma once

#include "core/order.cuh"
#include "core/reduce.cuh"
#include "core/rows.cuh"
#include "core/token_weights.h"

namespace arfast {

constexpr int kKeptThreads = 256;
constexpr int kRowSegments = 256;  // of sum_by and draw_by

struct KeptSmem {
  unsigned long long sums[kRowSegments + 1];
  unsigned low[256], high[256];  // halves of sums that many threads add to
  uint64_t chosen;               // of all threads one writes it
  uint64_t before;
};

// The scores of a row, and how tokens rank and weigh by them.
struct TokenScores {
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
template <typename Sum = uint64_t, typename Condition, typename Values>
__device__ Sum sum_where(int count, const Condition& condition, const Values& values) {
  Sum sum = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) sum += condition(i) ? values(i) : Sum{0};
  return sum;
}

// Calls f(score, token) for the tokens of the calling thread that have one above -infinity.
template <typename T, typename F>
__device__ void for_each_score(const RowOf<const T>& row, const TokenScores& scores, const F& f) {
  constexpr int kBatch = 16 / Vector16<T>::kSize;  // loads on their way together
  for (int64_t first = threadIdx.x; first < row.num_vectors(); first += kBatch * kKeptThreads) {
    Vector16<T> held[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * kKeptThreads < row.num_vectors()) held[k] = row.load(first + k * kKeptThreads);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t j = first + k * kKeptThreads;
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
__device__ uint64_t rank_at(const RowOf<const T>& row, const TokenScores& scores, uint64_t smallest, bool whole_ties,
                            const Measure& measure, const Limit& limit_of, KeptSmem& smem) {
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

// The smallest rank that top_k keeps.
template <typename T>
__device__ uint64_t smallest_of_top_k(int64_t top_k, const RowOf<const T>& row, const TokenScores& scores,
                                      KeptSmem& smem) {
  if (top_k == 0 || top_k >= row.size()) return 0;
  const auto limit = [&](uint64_t) { return static_cast<uint64_t>(top_k); };
  const auto one = [](float) { return uint64_t{1}; };
  const uint64_t smallest = rank_at(row, scores, 0, true, one, limit, smem);
  __syncthreads();
  return smallest;
}

// The smallest rank that top_p keeps of those from `smallest` on.
template <typename T>
__device__ uint64_t smallest_of_top_p(double top_p, uint64_t smallest, const RowOf<const T>& row,
                                      const TokenScores& scores, KeptSmem& smem) {
  if (top_p >= 1) return smallest;
  const auto limit = [&](uint64_t mass) { return nucleus_limit(top_p, mass); };
  const auto weight = [&](float score) { return scores.weight(score); };
  smallest = rank_at(row, scores, smallest, false, weight, limit, smem);
  __syncthreads();
  return smallest;
}

// The weight of a token with this logit, given the smallest rank that is kept.
__device__ inline uint64_t kept_weight(const TokenFilters& filters, const TokenScores& scores, uint64_t smallest,
                                       float logit, int64_t token) {
  const float score = scores.score(logit);
  if (!(score > -INFINITY) || scores.rank(score, token) < smallest) return 0;
  const uint64_t weight = scores.weight(score);
  return weight < filters.min_weight ? 0 : weight;
}

// The sum of measure(token) over a row. What `sums`, of kRowSegments + 1 entries, holds then is for draw_by.
template <typename Sum, typename Measure>
__device__ Sum sum_by(const Measure& measure, int64_t vocab_size, Sum* sums) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t size = (vocab_size + kRowSegments - 1) / kRowSegments;
  for (int segment = warp; segment < kRowSegments; segment += kKeptThreads / kWarpSize) {
    const int64_t end = min((segment + 1) * size, vocab_size);
    Sum sum = 0;
#pragma unroll 4
    for (int64_t token = segment * size + lane; token < end; token += kWarpSize) sum += measure(token);
    sum = warp_inclusive_sum(sum);
    if (lane == kWarpSize - 1) sums[segment] = sum;
  }
  __syncthreads();
  return sum_where<Sum>(kRowSegments, [](int) { return true; }, [&](int i) { return static_cast<Sum>(sums[i]); });
}

// After sum_by: the token at which the running sum, in ascending order, exceeds `number`, which is below the whole sum.
// First its segment is found, then the token in it.
template <typename Sum, typename Measure>
__device__ int64_t draw_by(const Measure& measure, int64_t vocab_size, Sum number, Sum* sums, KeptSmem& smem) {
  static_assert(kRowSegments == kKeptThreads);
  const auto sum = [&](int segment) { return static_cast<Sum>(sums[segment]); };
  const int64_t size = (vocab_size + kRowSegments - 1) / kRowSegments;
  const int mine = threadIdx.x, lane = threadIdx.x % kWarpSize;
  const Sum before_mine = sum_where<Sum>(kRowSegments, [&](int segment) { return segment < mine; }, sum);
  if (before_mine <= number && number - before_mine < sum(mine)) {
    smem.chosen = static_cast<uint64_t>(mine);
    sums[kRowSegments] = before_mine;
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(smem.chosen) * size, end = min(first + size, vocab_size);
  Sum before = sums[kRowSegments];
  __syncthreads();  // smem.chosen has been read
  for (int64_t base = first; base < end && threadIdx.x < kWarpSize; base += kWarpSize) {
    const int64_t token = base + lane;
    const Sum upto = before + warp_inclusive_sum(token < end ? measure(token) : Sum{0});
    const unsigned beyond = __ballot_sync(0xffffffffu, upto > number);
    if (beyond != 0) {
      if (lane == __ffs(static_cast<int>(beyond)) - 1) smem.chosen = static_cast<uint64_t>(token);
      break;
    }
    before = shuffle(upto, kWarpSize - 1);
  }
  __syncthreads();
  return static_cast<int64_t>(smem.chosen);
}

}  // namespace arfast
