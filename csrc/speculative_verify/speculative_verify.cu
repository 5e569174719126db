// Verification of drafts on the GPU in one launch. A block reads a row of logits: what the filters keep of it, and the
// weight of the draft. The last block of a sequence to finish decides, and draws from the two rows where the drafts
// end.
#include "core/kept_tokens.cuh"
#include "core/last_block.cuh"
#include "core/log_sum.cuh"
#include "core/runtime.cuh"
#include "core/select.cuh"
#include "speculative_verify/acceptance.h"
#include "speculative_verify/speculative_verify.h"

namespace arfast {
namespace {

struct Smem : KeptSmem {
  SelectStorage<kKeptThreads> select;
  uint128 residuals[kRowSegments + 1];
  int64_t position;
  int has_nan;
  bool is_last;
};

template <typename T>
struct Row {
  const T* logits;
  SpeculativeVerifyRow& found;
};

// Of the first G + 1 rows of a sequence, which are the target's, and the others, which are the draft's.
template <typename T>
__device__ Row<T> sequence_row(const SpeculativeVerifyParams& params, int64_t b, int64_t row) {
  const bool is_target = row <= params.num_drafts;
  const int64_t position = is_target ? row : row - params.num_drafts - 1;
  const void* logits = is_target ? params.target_logits : params.draft_logits;
  const int64_t offset = is_target ? b * params.target_stride_batch + position * params.target_stride_position
                                   : b * params.draft_stride_batch + position * params.draft_stride_position;
  return {static_cast<const T*>(logits) + offset, params.rows[b * speculative_verify_rows(params) + row]};
}

// Calls f(logit, token) for the tokens of the calling thread.
template <typename T, typename F>
__device__ void for_each_logit(const RowOf<const T>& row, const F& f) {
  for (int64_t j = threadIdx.x; j < row.num_vectors(); j += kKeptThreads) {
    const Vector16<T> held = row.load(j);
#pragma unroll
    for (int i = 0; i < Vector16<T>::kSize; ++i) f(to_float(held.elements[i]), row.column(j) + i);
  }
}

// Integers, so that the order of threads does not matter.
__device__ uint64_t block_total(uint64_t value, Smem& smem) {
  const auto warp_total = warp_inclusive_sum(static_cast<unsigned long long>(value));
  __syncthreads();
  if (threadIdx.x % kWarpSize == kWarpSize - 1) smem.sums[threadIdx.x / kWarpSize] = warp_total;
  __syncthreads();
  uint64_t total = 0;
  for (int warp = 0; warp < kKeptThreads / kWarpSize; ++warp) total += smem.sums[warp];
  return total;
}

template <typename T>
__device__ LogSum log_sum(const RowOf<const T>& row, Smem& smem) {
  float max = -INFINITY;
  bool has_nan = false;
  for_each_logit(row, [&](float logit, int64_t) {
    max = fmaxf(max, logit);
    has_nan |= logit != logit;
  });
  if (threadIdx.x == 0) smem.has_nan = 0;
  max = key_value(block_max<kKeptThreads>(candidate_key(max, 0), smem.select));
  if (has_nan) atomicOr(&smem.has_nan, 1);
  uint64_t sum = 0;
  for_each_logit(row, [&](float logit, int64_t) { sum += static_cast<uint64_t>(exp_below(logit, max) * 0x1p40f); });
  sum = block_total(sum, smem);
  return {max, smem.has_nan != 0 ? NAN : static_cast<float>(sum) * 0x1p-40f};
}

// The key of the `rank`-th score from 0, at most kKeptThreads - 1, and its token; 0 if there are fewer.
template <typename T>
__device__ uint64_t key_at(int64_t rank, const RowOf<const T>& row, const TokenScores& scores, Smem& smem) {
  if (threadIdx.x == 0) smem.chosen = 0;
  select_largest<kKeptThreads>(
      rank + 1,
      [&](const auto& f) {
        for_each_logit(row, [&](float logit, int64_t token) {
          const float score = scores.score(logit);
          f(score > -INFINITY ? candidate_key(score, static_cast<uint32_t>(token)) : uint64_t{0});
        });
      },
      [&](int64_t other, uint64_t key) {
        if (other == rank) smem.chosen = key;
      },
      smem.select);
  __syncthreads();
  const uint64_t key = smem.chosen;
  __syncthreads();
  return key;
}

// The smallest rank that the filters keep, but for min_p. Usual cuts are found in two passes, not digit by digit.
template <typename T>
__device__ uint64_t smallest_kept(const TokenFilters& filters, const RowOf<const T>& row, const TokenScores& scores,
                                  Smem& smem) {
  if (filters.top_p == 0) {
    const uint64_t key = key_at(0, row, scores, smem);
    return scores.rank(key_value(key), key_index(key));
  }
  uint64_t smallest = 0;
  if (filters.top_k > kKeptThreads) {
    smallest = smallest_of_top_k(filters.top_k, row, scores, smem);
  } else if (filters.top_k > 0) {
    const uint64_t key = key_at(filters.top_k - 1, row, scores, smem);
    if (key != 0) smallest = last_tie(scores.rank(key_value(key), 0));
  }
  return smallest_of_top_p(filters.top_p, smallest, row, scores, smem);
}

template <typename T>
__device__ void scan_row(const SpeculativeVerifyParams& params, int64_t b, int64_t row_index, Smem& smem) {
  const Row<T> row = sequence_row<T>(params, b, row_index);
  const RowOf<const T> logits(row.logits, params.vocab_size);
  const LogSum sum = log_sum(logits, smem);
  TokenScores scores{params.filters.temperature, 0};
  scores.best = scores.score(sum.max);
  const int64_t position = row_index <= params.num_drafts ? row_index : row_index - params.num_drafts - 1;
  const int64_t draft = draft_token(params, b, position);
  uint64_t smallest = 0, mass = 0, drafted = 0;
  if (scores.best > -INFINITY) {
    smallest = smallest_kept(params.filters, logits, scores, smem);
    for_each_logit(logits, [&](float logit, int64_t token) {
      mass += kept_weight(params.filters, scores, smallest, logit, token);
    });
    mass = block_total(mass, smem);
    if (draft >= 0) drafted = kept_weight(params.filters, scores, smallest, to_float(row.logits[draft]), draft);
  }
  if (threadIdx.x == 0) row.found = {sum.max, sum.sum, smallest, mass, drafted};
}

// The weights of a row that has been scanned.
template <typename T>
struct Weights {
  const TokenFilters& filters;
  const T* logits;
  TokenScores scores;
  uint64_t smallest;
  uint64_t mass;

  __device__ Weights(const TokenFilters& filters, const Row<T>& row)
      : filters(filters),
        logits(row.logits),
        scores{filters.temperature, 0},
        smallest(row.found.smallest),
        mass(row.found.mass) {
    scores.best = scores.score(row.found.max);
  }
  __device__ Share operator()(int64_t token) const {
    return {mass == 0 ? 0 : kept_weight(filters, scores, smallest, to_float(logits[token]), token), mass};
  }
};

// Of the draft at a position, in the draft's distribution.
template <typename T>
__device__ Share draft_share(const SpeculativeVerifyParams& params, int64_t b, int64_t position) {
  if (params.draft_logits == nullptr) return {1, 1};
  const SpeculativeVerifyRow& found = sequence_row<T>(params, b, params.num_drafts + 1 + position).found;
  return found.mass == 0 ? Share{1, 1} : Share{found.drafted, found.mass};
}

// The position at which a draft is rejected, or there is none.
template <typename T>
__device__ int64_t first_rejected(const SpeculativeVerifyParams& params, int64_t b, const int64_t* state) {
  int64_t position = 0;
  for (; draft_token(params, b, position) >= 0; ++position) {
    const uint64_t bits = random_bits(state, params.state_column_stride, position);
    const SpeculativeVerifyRow& found = sequence_row<T>(params, b, position).found;
    if (!accepts(acceptance_bits(bits), {found.drafted, found.mass}, draft_share<T>(params, b, position))) break;
  }
  return position;
}

// The token that follows the accepted drafts.
template <typename T>
__device__ int64_t draw_token(const SpeculativeVerifyParams& params, int64_t b, int64_t position, uint64_t bits,
                              Smem& smem) {
  const Weights<T> target(params.filters, sequence_row<T>(params, b, position));
  const int64_t draft = draft_token(params, b, position);
  if (draft >= 0) {
    const bool has_row = params.draft_logits != nullptr;
    const Weights<T> proposed(params.filters,
                              sequence_row<T>(params, b, has_row ? params.num_drafts + 1 + position : 0));
    const bool has_weights = has_row && proposed.mass > 0;
    const auto rest = [&](int64_t v) {
      const Share p = target(v);
      return p.weight == 0 ? uint128{0} : residual(p, has_weights ? proposed(v) : Share{v == draft, 1});
    };
    const uint128 mass = sum_by(rest, params.vocab_size, smem.residuals);
    if (mass > 0) return draw_by(rest, params.vocab_size, random_below(bits, mass), smem.residuals, smem);
  }
  const auto weight = [&](int64_t v) { return static_cast<unsigned long long>(target(v).weight); };
  const unsigned long long mass = sum_by(weight, params.vocab_size, smem.sums);
  return mass > 0 ? draw_by(weight, params.vocab_size, random_below(bits, mass), smem.sums, smem) : 0;
}

template <typename T>
__device__ void finish_sequence(const SpeculativeVerifyParams& params, int64_t b, Smem& smem) {
  const int64_t num_positions = params.num_drafts + 1;
  int64_t* state = params.generator_state + b * params.state_stride;
  if (threadIdx.x == 0) smem.position = first_rejected<T>(params, b, state);
  __syncthreads();
  const int64_t position = smem.position;
  // Its barriers are between the reads of the state here and the write below.
  const int64_t drawn =
      draw_token<T>(params, b, position, random_bits(state, params.state_column_stride, position), smem);
  for (int64_t i = threadIdx.x; i < num_positions; i += kKeptThreads) {
    const int64_t token = i < position ? draft_token(params, b, i) : i == position ? drawn : -1;
    params.tokens[b * num_positions + i] = token;
    float logprob = 0;
    if (token >= 0) {
      const Row<T> row = sequence_row<T>(params, b, i);
      logprob = to_float(row.logits[token]) - row.found.max - logf(row.found.sum);
    }
    params.logprobs[b * num_positions + i] = logprob;
  }
  if (threadIdx.x != 0) return;
  params.num_accepted[b] = static_cast<int32_t>(position);
  advance_state(state, params.state_column_stride, position + 1);
}

template <typename T>
__global__ void __launch_bounds__(kKeptThreads, 2) speculative_verify_kernel(SpeculativeVerifyParams params) {
  Smem& smem = shared_storage<Smem>();
  const int64_t num_rows = speculative_verify_rows(params), b = blockIdx.x / num_rows;
  scan_row<T>(params, b, blockIdx.x % num_rows, smem);
  if (arrive_last(params.num_arrived + b, static_cast<uint32_t>(num_rows), smem.is_last)) {
    finish_sequence<T>(params, b, smem);
  }
}

}  // namespace

const char* speculative_verify_cuda(const SpeculativeVerifyParams& params, void* stream) {
  const int64_t blocks = params.batch * speculative_verify_rows(params);
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "B * G is too large for one launch";
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kKeptThreads), sizeof(Smem)};
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    return launch(speculative_verify_kernel<typename decltype(tag)::type>, shape, stream, params);
  });
}

}  // namespace arfast
