// Beam pruning on the GPU: online log-sum-exp and top-M (Milakov and Gimelshein 2018, arXiv 1805.02867, section 4) in
// one launch. A block scans a part of a row that fits its registers; the last block of a group to finish merges the
// parts.
#include "beam_prune/advance.h"
#include "beam_prune/beam_prune.h"
#include "core/last_block.cuh"
#include "core/log_sum.cuh"
#include "core/order.cuh"
#include "core/reduce.cuh"
#include "core/rows.cuh"
#include "core/runtime.cuh"
#include "core/select.cuh"

namespace arfast {
namespace {

constexpr int kThreads = 256;
template <typename T>
constexpr int kHeldVectors = kBeamPruneHeldBytes / 16 * sizeof(T) / 4;  // as many elements whatever their size

struct Smem {
  union {
    SelectStorage<kThreads> select;
    AdvanceScratch advance;  // of the last block, when all is selected
  };
  float maxima[kThreads / kWarpSize];
  float sums[kThreads / kWarpSize];
  bool is_last;
  int may_lack_ties;
  uint64_t last_key;
};

// Where the parts of the rows leave what the merge needs.
struct Workspace {
  LogSum* sums;           // [B * K, parts]
  uint64_t* candidates;   // [B * K, parts, list capacity]: keys of logit and token, 0 for none
  uint32_t* num_arrived;  // [B], zero before the launch
};

__device__ Workspace workspace_of(const BeamPruneParams& params) {
  const int64_t rows = params.num_groups * params.num_beams;
  auto* candidates = static_cast<uint64_t*>(params.workspace);
  auto* sums = reinterpret_cast<LogSum*>(candidates + rows * params.num_parts * beam_prune_list_capacity(params));
  return {sums, candidates, params.num_arrived};
}

__device__ LogSum block_log_sum(LogSum mine, Smem& smem) {
  mine = combine_warp(mine);
  if (threadIdx.x % kWarpSize == 0) {
    smem.maxima[threadIdx.x / kWarpSize] = mine.max;
    smem.sums[threadIdx.x / kWarpSize] = mine.sum;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  LogSum other{-INFINITY, 0};
  if (lane < kThreads / kWarpSize) other = {smem.maxima[lane], smem.sums[lane]};
  return combine_warp(other);
}

template <typename T>
__device__ const T* row_logits(const BeamPruneParams& params, int64_t row) {
  return static_cast<const T*>(params.logits) + row * params.logits_stride;
}

// One part of one row: its log-sum-exp, and its best tokens. The logits stay in registers, but for drawing: the noise
// is long, and the loop around it should not be unrolled.
template <typename T, bool kDrawn>
__device__ void scan_part(const BeamPruneParams& params, const Workspace& workspace, int64_t row, int64_t part,
                          Smem& smem) {
  constexpr int kVectors = kHeldVectors<T>, kUnrolled = kDrawn ? 1 : kVectors;
  const RowOf<const T> logits(row_logits<T>(params, row), params.vocab_size);
  const bool* banned = params.banned != nullptr ? params.banned + row * params.banned_stride : nullptr;
  const GumbelNoise noise = noise_of_row(params, row);
  const int64_t first = part * params.part_vectors, end = min(first + params.part_vectors, logits.num_vectors());
  Vector16<T> held[kUnrolled];
#pragma unroll
  for (int k = 0; k < kVectors && !kDrawn; ++k) {
    const int64_t j = first + threadIdx.x + k * kThreads;
    if (j < end) held[k] = logits.load(j);
  }
  const auto for_each = [&](const auto& f) {
#pragma unroll kUnrolled
    for (int k = 0; k < kVectors; ++k) {
      const int64_t j = first + threadIdx.x + k * kThreads;
      if (j >= end) break;
      if constexpr (kDrawn) held[0] = logits.load(j);
      const Vector16<T>& vector = held[kDrawn ? 0 : k];
#pragma unroll
      for (int i = 0; i < Vector16<T>::kSize; ++i) f(to_float(vector.elements[i]), logits.column(j) + i);
    }
  };
  LogSum mine{-INFINITY, 0};
  for_each([&](float x, int64_t) { mine.max = fmaxf(mine.max, x); });
  for_each([&](float x, int64_t column) {
    if (column >= 0 && column < params.vocab_size) mine.sum += exp_below(x, mine.max);
  });
  const LogSum all = block_log_sum(mine, smem);
  const int64_t slot = row * params.num_parts + part, capacity = beam_prune_list_capacity(params);
  if (threadIdx.x == 0) workspace.sums[slot] = all;
  uint64_t* out = workspace.candidates + slot * capacity;
  for (int64_t i = threadIdx.x; i < capacity; i += kThreads) out[i] = 0;
  select_largest<kThreads>(
      capacity,
      [&](const auto& f) {
        for_each([&](float x, int64_t column) {
          // NaN compares false; what sticks out of the row is -infinity.
          if (x > -INFINITY && !(banned != nullptr && banned[column])) {
            f(candidate_key(kDrawn ? noise.add_to(x, column) : x, static_cast<uint32_t>(column)));
          }
        });
      },
      [&](int64_t rank, uint64_t key) { out[rank] = key; }, smem.select);
}

// Computed in float32 in this order, as everybody else does: one rounding more or less would change ties.
__device__ float score_of(const BeamPruneParams& params, int64_t row, float logit) {
  return __fadd_rn(__fsub_rn(logit, params.lse[row]), params.scores[row]);
}

// The key of a candidate of the group, or 0: scores of NaN or -infinity are no candidates.
__device__ uint64_t group_key(const BeamPruneParams& params, int64_t row, float logit, uint32_t token) {
  const float score = score_of(params, row, logit);
  const uint32_t beam = static_cast<uint32_t>(row % params.num_beams);
  if (!(score > -INFINITY) || ends_too_early(params, row / params.num_beams, token)) return 0;
  return candidate_key(score, beam * static_cast<uint32_t>(params.vocab_size) + token);
}

template <typename T, bool kDrawn>
__device__ void write_candidate(const BeamPruneParams& params, int64_t group, int64_t rank, uint64_t key) {
  const int64_t at = group * params.num_candidates + rank;
  const uint32_t vocab_size = static_cast<uint32_t>(params.vocab_size);
  const uint32_t parent = key_index(key) / vocab_size, token = key_index(key) % vocab_size;
  float score = key_value(key);
  if (kDrawn && score > -INFINITY) {  // it has noise
    const int64_t row = group * params.num_beams + parent;
    score = score_of(params, row, to_float(row_logits<T>(params, row)[token]));
  }
  params.out_scores[at] = score;
  params.parents[at] = static_cast<int32_t>(parent);
  params.tokens[at] = static_cast<int32_t>(token);
}

// Every token of the group's rows, for the rare group in which rounding made scores equal at the end of the list.
template <typename T, bool kDrawn>
__device__ void select_from_all_tokens(const BeamPruneParams& params, int64_t group, Smem& smem) {
  const int64_t total = params.num_beams * params.vocab_size;
  select_largest<kThreads>(
      params.num_candidates,
      [&](const auto& f) {
        for (int64_t i = threadIdx.x; i < total; i += kThreads) {
          const int64_t row = group * params.num_beams + i / params.vocab_size, token = i % params.vocab_size;
          if (params.banned != nullptr && params.banned[row * params.banned_stride + token]) continue;
          float x = to_float(row_logits<T>(params, row)[token]);
          if constexpr (kDrawn) x = noise_of_row(params, row).add_to(x, token);
          f(group_key(params, row, x, static_cast<uint32_t>(token)));
        }
      },
      [&](int64_t rank, uint64_t key) { write_candidate<T, kDrawn>(params, group, rank, key); }, smem.select);
}

template <typename T, bool kDrawn>
__device__ void merge_group(const BeamPruneParams& params, const Workspace& workspace, int64_t group, Smem& smem) {
  const int64_t first_row = group * params.num_beams, capacity = beam_prune_list_capacity(params);
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t beam = threadIdx.x / kWarpSize; beam < params.num_beams; beam += kThreads / kWarpSize) {
    LogSum mine{-INFINITY, 0};
    for (int64_t part = lane; part < params.num_parts; part += kWarpSize) {
      mine = combine(mine, workspace.sums[(first_row + beam) * params.num_parts + part]);
    }
    mine = combine_warp(mine);
    const float lse = mine.max + logf(mine.sum);
    if (lane == 0) params.lse[first_row + beam] = params.log_probs && fabsf(lse) < INFINITY ? 0 : lse;
  }
  for (int64_t i = threadIdx.x; i < params.num_candidates; i += kThreads) {  // what stays when there are too few
    write_candidate<T, kDrawn>(params, group, i, candidate_key(-INFINITY, 0));
  }
  if (threadIdx.x == 0) {
    smem.last_key = 0;
    smem.may_lack_ties = 0;
  }
  __syncthreads();  // lse, for the scores

  const int64_t per_row = params.num_parts * capacity, total = params.num_beams * per_row;
  const uint64_t* candidates = workspace.candidates + first_row * per_row;
  const auto key_at = [&](int64_t i) {
    const uint64_t key = candidates[i];
    return key == 0 ? 0 : group_key(params, first_row + i / per_row, key_value(key), key_index(key));
  };
  select_largest<kThreads>(
      params.num_candidates,
      [&](const auto& f) {
        for (int64_t i = threadIdx.x; i < total; i += kThreads) f(key_at(i));
      },
      [&](int64_t rank, uint64_t key) {
        write_candidate<T, kDrawn>(params, group, rank, key);
        if (rank == params.num_candidates - 1) smem.last_key = key;
      },
      smem.select);
  __syncthreads();
  // Different logits may have the same score, and then the smaller token goes first: if the last of a full list scores
  // as well as the last candidate, so may a smaller token that is not in the list.
  if (smem.last_key == 0) return;
  for (int64_t list = threadIdx.x; list < params.num_beams * params.num_parts; list += kThreads) {
    const uint64_t key = key_at(list * capacity + capacity - 1);
    if (key >> 32 >= smem.last_key >> 32) atomicOr(&smem.may_lack_ties, 1);
  }
  __syncthreads();
  if (smem.may_lack_ties) select_from_all_tokens<T, kDrawn>(params, group, smem);
}

// All threads of the block.
struct BlockTeam {
  __device__ static int64_t index() { return threadIdx.x; }
  __device__ static constexpr int64_t count() { return kThreads; }
  __device__ static void sync() { __syncthreads(); }
};

template <typename T, bool kDrawn>
__global__ void __launch_bounds__(kThreads, kDrawn ? 3 : 2) beam_prune_kernel(BeamPruneParams params) {
  Smem& smem = shared_storage<Smem>();
  const Workspace workspace = workspace_of(params);
  const int64_t part = blockIdx.x % params.num_parts, row = blockIdx.x / params.num_parts;
  const int64_t group = row / params.num_beams;
  scan_part<T, kDrawn>(params, workspace, row, part, smem);
  const uint32_t expected = static_cast<uint32_t>(params.num_beams * params.num_parts);
  if (!arrive_last(workspace.num_arrived + group, expected, smem.is_last)) return;
  merge_group<T, kDrawn>(params, workspace, group, smem);
  if (params.state.lengths == nullptr) return;
  __syncthreads();  // the candidates, from any thread
  Advance(params, group, smem.advance, BlockTeam{}).run();
}

}  // namespace

const char* beam_prune_cuda(const BeamPruneParams& params, void* stream) {
  const int64_t blocks = params.num_groups * params.num_beams * params.num_parts;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "B * K * V is too large for one launch";
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(Smem)};
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return params.generator_state != nullptr ? launch(beam_prune_kernel<T, true>, shape, stream, params)
                                             : launch(beam_prune_kernel<T, false>, shape, stream, params);
  });
}

}  // namespace arfast
