// Sampling on the GPU in one launch. A block scans a part of a row that fits its registers: its log-sum-exp and, for a
// small top_k, its best tokens. The last block of a row to finish draws: from the lists of best tokens if they hold all
// that top_k leaves, else from the row.
#include <type_traits>

#include "core/last_block.cuh"
#include "core/log_sum.cuh"
#include "core/runtime.cuh"
#include "sample/list_draw.cuh"
#include "sample/sample.h"

namespace arfast {
namespace {

constexpr int kHeldTokens = 32;  // of a thread
template <typename Params>
constexpr bool kIsStep = std::is_same_v<Params, SampleStepParams>;

// Where the parts of the rows leave what the last block needs.
struct Workspace {
  LogSum* sums;     // [R, parts]
  uint64_t* lists;  // [R, parts, listed]: keys of logit and token, 0 for none
};

__device__ Workspace workspace_of(const SampleParams& params) {
  auto* lists = static_cast<uint64_t*>(params.workspace);
  const int64_t parts = params.num_rows * sample_parts(params);
  return {reinterpret_cast<LogSum*>(lists + parts * sample_listed(params)), lists};
}

template <typename T>
__device__ const T* row_logits(const SampleParams& params, int64_t row) {
  return static_cast<const T*>(params.logits) + row * params.logits_stride;
}

__device__ float max_of_block(float value, SampleSmem& smem) {
  return key_value(block_max<kSampleThreads>(candidate_key(warp_max(value), 0), smem.select));
}

// The sum of the integers 2^40 e^(x - max): which thread holds which tokens depends on where the row begins in memory,
// and so would the bits of a sum of floats.
template <typename Logit>
__device__ LogSum part_log_sum(const Logit& logit, SampleSmem& smem) {
  float max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kHeldTokens; ++i) max = fmaxf(max, logit(i));
  max = max_of_block(max, smem);
  unsigned long long sum = 0;
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < kHeldTokens; ++i) {
    has_nan |= logit(i) != logit(i);
    sum += static_cast<uint64_t>(exp_below(logit(i), max) * 0x1p40f);
  }
  if (threadIdx.x == 0) {
    smem.sums[0] = 0;
    smem.num_survivors = 0;
  }
  __syncthreads();
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % kWarpSize == 0) atomicAdd(&smem.sums[0], sum);
  if (has_nan) atomicOr(&smem.num_survivors, 1);
  __syncthreads();
  return {max, smem.num_survivors > 0 ? NAN : static_cast<float>(smem.sums[0]) * 0x1p-40f};
}

template <typename T>
__device__ void scan_part(const SampleParams& params, const Workspace& workspace, int64_t row, int64_t part,
                          SampleSmem& smem) {
  constexpr int kSize = Vector16<T>::kSize, kHeldVectors = kHeldTokens / kSize;
  const int64_t first_token = part * kSamplePartTokens;
  const RowOf<const T> logits(row_logits<T>(params, row) + first_token,
                              min(kSamplePartTokens, params.vocab_size - first_token));
  Vector16<T> held[kHeldVectors];
#pragma unroll
  for (int k = 0; k < kHeldVectors; ++k) {
    const int64_t j = threadIdx.x + k * kSampleThreads;
    if (j < logits.num_vectors()) {
      held[k] = logits.load(j);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) held[k].elements[i] = from_float<T>(-INFINITY);
    }
  }
  const auto logit = [&](int i) { return to_float(held[i / kSize].elements[i % kSize]); };
  const int64_t slot = row * sample_parts(params) + part, capacity = sample_listed(params);
  const LogSum sum = part_log_sum(logit, smem);
  if (threadIdx.x == 0) workspace.sums[slot] = sum;
  if (capacity == 0) return;
  // Once, and in place of the logits: the compiler would keep both.
  uint32_t orders[kHeldTokens];
#pragma unroll
  for (int i = 0; i < kHeldTokens; ++i) orders[i] = logit(i) > -INFINITY ? order_of(logit(i)) : 0;
  const uint32_t last_index = 0xffffffffu - static_cast<uint32_t>(first_token + logits.column(threadIdx.x));
  uint64_t* list = workspace.lists + slot * capacity;
  for (int64_t i = threadIdx.x; i < capacity; i += kSampleThreads) list[i] = 0;
  select_largest<kSampleThreads>(
      capacity,
      [&](const auto& f) {
#pragma unroll
        for (int i = 0; i < kHeldTokens; ++i) {
          const uint32_t index = last_index - (i / kSize * kSampleThreads * kSize + i % kSize);
          f(orders[i] == 0 ? uint64_t{0} : uint64_t{orders[i]} << 32 | index);
        }
      },
      [&](int64_t rank, uint64_t key) { list[rank] = key; }, smem.select);
}

// Of a row, whose parts are summed up in a fixed order, given to every thread.
__device__ LogSum row_log_sum(const SampleParams& params, const LogSum* parts) {
  LogSum mine{-INFINITY, 0};
  for (int64_t part = threadIdx.x % kWarpSize; part < sample_parts(params); part += kWarpSize) {
    mine = combine(mine, parts[part]);
  }
  return combine_warp(mine);
}

// Leaves the token in smem.chosen.
template <typename T>
__device__ void draw_from_row(const SampleParams& params, const T* logits, const int64_t* state,
                              const TokenScores& scores, SampleSmem& smem) {
  const RowOf<const T> row(logits, params.vocab_size);
  const uint64_t of_top_k = smallest_of_top_k(params.filters.top_k, row, scores, smem);
  const uint64_t smallest = smallest_of_top_p(params.filters.top_p, of_top_k, row, scores, smem);
  const auto weight = [&](int64_t token) {
    return kept_weight(params.filters, scores, smallest, to_float(logits[token]), token);
  };
  const unsigned long long mass = sum_by(weight, params.vocab_size, smem.sums);
  const unsigned long long number = random_below(random_bits(state, params.state_column_stride), mass);
  draw_by(weight, params.vocab_size, number, smem.sums, smem);
}

template <typename T, typename Params>
__device__ void finish_row(const Params& params, const Workspace& workspace, int64_t row, SampleSmem& smem) {
  const int64_t first_part = row * sample_parts(params), capacity = sample_listed(params);
  const T* logits = row_logits<T>(params, row);
  int64_t* state = params.generator_state + row * params.state_stride;
  const LogSum sum = row_log_sum(params, workspace.sums + first_part);
  TokenScores scores{params.filters.temperature, 0};
  scores.best = scores.score(sum.max);
  if (scores.best == -INFINITY) {
    if (threadIdx.x == 0) smem.chosen = 0;
  } else if (capacity == 0 || !draw_from_lists(params, workspace.lists + first_part * capacity, state, scores, smem)) {
    draw_from_row(params, logits, state, scores, smem);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const int64_t token = static_cast<int64_t>(smem.chosen);
  const float logprob = to_float(logits[token]) - sum.max - logf(sum.sum);
  if constexpr (kIsStep<Params>) {
    append(params.state, row, token, logprob);
  } else {
    params.tokens[row] = token;
    params.logprobs[row] = logprob;
  }
  advance_state(state, params.state_column_stride, 1);
}

// A step needs a few registers more than 80, the most that leave room for three blocks.
template <typename T, typename Params>
__global__ void __launch_bounds__(kSampleThreads, kIsStep<Params> ? 2 : 3) sample_kernel(Params params) {
  SampleSmem& smem = shared_storage<SampleSmem>();
  const Workspace workspace = workspace_of(params);
  const int64_t num_parts = sample_parts(params), part = blockIdx.x % num_parts, row = blockIdx.x / num_parts;
  if constexpr (kIsStep<Params>) {
    // All blocks of a row see the same: its state changes when the last of them has arrived.
    if (!goes_on(params.state, row)) {
      if (part == 0 && threadIdx.x == 0) feed_padding(params.state, row);
      return;
    }
  }
  scan_part<T>(params, workspace, row, part, smem);
  if (arrive_last(params.num_arrived + row, static_cast<uint32_t>(num_parts), smem.is_last))
    finish_row<T>(params, workspace, row, smem);
}

template <typename Params>
const char* launch_sample(const Params& params, void* stream) {
  const int64_t blocks = params.num_rows * sample_parts(params);
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "R * V is too large for one launch";
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kSampleThreads), sizeof(SampleSmem)};
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    return launch(sample_kernel<typename decltype(tag)::type, Params>, shape, stream, params);
  });
}

}  // namespace

const char* sample_cuda(const SampleParams& params, void* stream) { return launch_sample(params, stream); }
const char* sample_step_cuda(const SampleStepParams& params, void* stream) { return launch_sample(params, stream); }

}  // namespace arfast
