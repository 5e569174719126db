// Top-k routing of tokens to experts on the GPU (Shazeer et al. 2017, arXiv 1701.06538, section 2.1; groups and bias:
// DeepSeek-V3, arXiv 2412.19437, equations 12 to 16). A warp chooses for one token on integers in the order of the
// scores, so that the ids are unique and in range whatever the logits are. The choices are then sorted by expert by
// counting: within a block of tokens a bit per token and expert gives the rank, between blocks a prefix sum does. Only
// commutative atomics, so the order is that of a stable sort. One block of tokens, as in decoding, is sorted in the
// same launch; of more, a second launch adds up the counts and a third places the rows, each begun while the one before
// ends.
#include "core/order.cuh"
#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "core/runtime.cuh"
#include "core/vector.cuh"
#include "moe_routing/moe_routing.h"

namespace arfast {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMaxExperts = 1024;
static_assert(kMoeRouteGpuBlock == kWarpSize, "a word of the masks holds one bit per token of a block");

// Shared memory of the choice: a mask per expert, then, with groups, the working memory of each warp.
struct Smem {
  int32_t* of_warps;       // [warps of the block]
  uint32_t* masks;         // [E]: bit t for token t of the block
  float* choice;           // [E]
  float* group_scores;     // [G]
  int32_t* group_is_open;  // [G]

  __device__ Smem(const MoeRouteParams& params, int warp) {
    of_warps = &shared_storage<int32_t>();
    masks = reinterpret_cast<uint32_t*>(of_warps + kWarps);
    const int64_t experts = params.num_experts, groups = params.num_groups;
    choice = reinterpret_cast<float*>(masks + experts) + warp * (experts + 2 * groups);
    group_scores = choice + experts;
    group_is_open = reinterpret_cast<int32_t*>(group_scores + groups);
  }
};

size_t shared_bytes(const MoeRouteParams& params) {
  const int64_t per_warp = params.num_groups > 1 ? params.num_experts + 2 * params.num_groups : 0;
  return (kWarps + params.num_experts + kWarps * per_warp) * sizeof(float);
}

// NaN and -inf count as the lowest finite number.
__device__ float floored(float v) { return v > -3.40282347e38f ? v : -3.40282347e38f; }

// softmax is exp(logit - shift) / sum. Through lse it would lose the digits that lse has before the point.
struct RowStatistics {
  float shift, sum, lse;
};

// The logits of one token: lane l has those of the experts from l * kSlots on, so that the lowest lane is the lowest
// index, too.
template <int kSlots>
__device__ RowStatistics row_statistics(const float (&logits)[kSlots]) {
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) top = fmaxf(top, logits[i]);
  top = warp_max(top);
  const float shift = top - top == 0 ? top : 0.0f;  // an infinite one would make inf - inf
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) sum += expf(logits[i] - shift);
  sum = warp_sum(sum);
  return {shift, sum, shift + logf(sum)};
}

// Leaves the choice among the best groups: lanes over groups. A group is ranked by its best score for softmax
// (DeepSeek-V2), by the sum of its two best for sigmoid (DeepSeek-V3).
template <int kSlots>
__device__ void limit_groups(const MoeRouteParams& params, const Smem& smem, uint32_t (&keys)[kSlots]) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t size = params.num_experts / params.num_groups;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int64_t expert = lane * kSlots + i;
    if (expert < params.num_experts) smem.choice[expert] = from_order(keys[i]);
  }
  __syncwarp();
  for (int64_t group = lane; group < params.num_groups; group += kWarpSize) {
    const float* members = smem.choice + group * size;
    float best = members[0], second = -INFINITY;
    for (int64_t i = 1; i < size; ++i) {
      second = fmaxf(second, fminf(members[i], best));
      best = fmaxf(best, members[i]);
    }
    smem.group_scores[group] = floored(params.sigmoid && size > 1 ? best + second : best);
  }
  __syncwarp();
  for (int64_t group = lane; group < params.num_groups; group += kWarpSize) {
    const float score = smem.group_scores[group];
    int64_t rank = 0;
    for (int64_t other = 0; other < params.num_groups; ++other) {
      const float theirs = smem.group_scores[other];
      rank += theirs > score || (theirs == score && other < group);
    }
    smem.group_is_open[group] = rank < params.top_groups;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int64_t expert = lane * kSlots + i;
    if (expert < params.num_experts && !smem.group_is_open[expert / size]) keys[i] = 0;
  }
}

// What the experts compete with, as integers: 0 for none. Scores rise with the logits, so where nothing is added to
// them the logits themselves decide: the order is then exact.
template <int kSlots>
__device__ void fill_keys(const MoeRouteParams& params, const RowStatistics& row, const float (&logits)[kSlots],
                          uint32_t (&keys)[kSlots]) {
  const bool by_logit = params.bias == nullptr && (!params.sigmoid || params.num_groups == 1);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int64_t expert = threadIdx.x % kWarpSize * kSlots + i;
    keys[i] = 0;
    if (expert >= params.num_experts) continue;
    float v = logits[i];
    if (!by_logit) v = params.sigmoid ? sigmoid(v) : expf(v - row.shift) / row.sum;
    if (params.bias != nullptr) v += params.bias[expert];
    keys[i] = order_of(floored(v));
  }
}

// Takes the largest key of the warp; the lane that owns it writes the choice and clears the key.
template <int kSlots>
__device__ void take_best(const MoeRouteParams& params, int64_t choice, int token, const float (&logits)[kSlots],
                          uint32_t (&keys)[kSlots], const Smem& smem) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t best = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) best = max(best, keys[i]);
  const uint32_t top = __reduce_max_sync(0xffffffffu, best);
  if (lane != __ffs(static_cast<int>(__ballot_sync(0xffffffffu, best == top))) - 1) return;
  bool taken = false;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (taken || keys[i] != top) continue;
    taken = true;
    keys[i] = 0;
    const int expert = lane * kSlots + i;
    params.expert_ids[choice] = expert;
    params.expert_weights[choice] = logits[i];  // for now
    atomicOr(smem.masks + expert, 1u << token);
  }
}

// Turns the logits of the chosen experts into their weights.
__device__ void weigh(const MoeRouteParams& params, int64_t token, const RowStatistics& row) {
  float* weights = params.expert_weights + token * params.top_k;
  const int lane = threadIdx.x % kWarpSize;
  float shift = row.shift, sum = 0;
  if (params.renormalize) {  // softmax over the chosen: the same quotient without underflow
    shift = -INFINITY;
    for (int64_t j = lane; j < params.top_k; j += kWarpSize) shift = fmaxf(shift, weights[j]);
    shift = warp_max(shift);
  }
  const auto score = [&](float logit) { return params.sigmoid ? sigmoid(logit) : expf(logit - shift); };
  for (int64_t j = lane; j < params.top_k; j += kWarpSize) sum += score(weights[j]);
  sum = warp_sum(sum);
  float factor = static_cast<float>(params.scale);
  if (params.renormalize) {
    factor /= params.sigmoid ? sum + static_cast<float>(kSigmoidEps) : sum;
  } else if (!params.sigmoid) {
    factor /= row.sum;
  }
  // A NaN anywhere in a row must show, although it lost the competition.
  if (row.lse != row.lse || (!params.sigmoid && row.lse - row.lse != 0)) factor = __uint_as_float(0x7fc00000u);
  for (int64_t j = lane; j < params.top_k; j += kWarpSize) weights[j] = score(weights[j]) * factor;
}

// The counting sort of the tokens of the only block. A thread counts for a run of experts.
__device__ void place_alone(const MoeRouteParams& params, const Smem& smem, int count) {
  const int experts = static_cast<int>(params.num_experts), per_thread = (experts + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * per_thread, experts), end = min(begin + per_thread, experts);
  int32_t rows = 0;
  for (int e = begin; e < end; ++e) rows += __popc(smem.masks[e]);
  int32_t first = block_exclusive_sum(rows, smem.of_warps);
  for (int e = begin; e < end; ++e) {
    const int32_t tokens = __popc(smem.masks[e]);
    params.tokens_per_expert[e] = tokens;
    params.offsets[e] = first;
    first += tokens;
  }
  if (threadIdx.x == kThreads - 1) params.offsets[experts] = first;
  __syncthreads();
  for (int64_t choice = threadIdx.x; choice < count * params.top_k; choice += kThreads) {
    const int token = static_cast<int>(choice / params.top_k), expert = params.expert_ids[choice];
    const int32_t row = params.offsets[expert] + __popc(smem.masks[expert] & ((1u << token) - 1));
    params.position[choice] = row;
    params.source_token[row] = token;
  }
}

template <typename T, int kSlots>
__global__ void __launch_bounds__(kThreads, 1) moe_route_choose_kernel(MoeRouteParams params) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Smem smem(params, warp);
  for (int64_t e = threadIdx.x; e < params.num_experts; e += kThreads) smem.masks[e] = 0;
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * kMoeRouteGpuBlock;
  const int count = static_cast<int>(min(int64_t{kMoeRouteGpuBlock}, params.num_tokens - begin));
  for (int t = warp; t < count; t += kWarps) {
    const int64_t token = begin + t;
    const T* row_logits = static_cast<const T*>(params.router_logits) + token * params.logits_stride;
    float logits[kSlots];
    uint32_t keys[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int64_t expert = lane * kSlots + i;
      logits[i] = expert < params.num_experts ? to_float(row_logits[expert]) : -INFINITY;
    }
    const RowStatistics row = row_statistics(logits);
    fill_keys(params, row, logits, keys);
    if (params.num_groups > 1) limit_groups(params, smem, keys);
    for (int64_t j = 0; j < params.top_k; ++j) take_best(params, token * params.top_k + j, t, logits, keys, smem);
    __syncwarp();
    weigh(params, token, row);
    if (lane == 0) params.lse[token] = row.lse;
  }
  __syncthreads();
  if (gridDim.x == 1) return place_alone(params, smem, count);
  ptx::grid_dependency_launch();
  int32_t* histogram = params.histograms + blockIdx.x * params.num_experts;
  for (int64_t e = threadIdx.x; e < params.num_experts; e += kThreads) histogram[e] = __popc(smem.masks[e]);
  // For now the position of a choice is its rank among those of its expert in this block.
  for (int64_t i = threadIdx.x; i < count * params.top_k; i += kThreads) {
    const int64_t choice = begin * params.top_k + i;
    const uint32_t earlier = (1u << i / params.top_k) - 1;
    params.position[choice] = __popc(smem.masks[params.expert_ids[choice]] & earlier);
  }
}

// Turns the histograms into where each block's rows of each expert begin: one block, a thread per expert and segment of
// the histograms.
__global__ void __launch_bounds__(kMaxExperts) moe_route_scan_kernel(MoeRouteParams params) {
  int32_t* sums = &shared_storage<int32_t>();  // [segments, E], then [32]
  const int experts = static_cast<int>(params.num_experts), segments = kMaxExperts / experts;
  int32_t* of_warps = sums + kMaxExperts;
  const int segment = threadIdx.x / experts, expert = threadIdx.x % experts;
  ptx::grid_dependency_launch();
  ptx::grid_dependency_wait();
  const int64_t blocks = (params.num_tokens + kMoeRouteGpuBlock - 1) / kMoeRouteGpuBlock;
  const int64_t per_segment = (blocks + segments - 1) / segments;
  const int64_t first = min(segment * per_segment, blocks), end = min(first + per_segment, blocks);
  int32_t sum = 0;
  if (segment < segments) {
#pragma unroll 8
    for (int64_t block = first; block < end; ++block) sum += params.histograms[block * experts + expert];
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
  int32_t total = 0;
  if (threadIdx.x < experts) {
    for (int s = 0; s < segments; ++s) {
      const int32_t before = total;
      total += sums[s * experts + threadIdx.x];
      sums[s * experts + threadIdx.x] = before;
    }
  }
  const int32_t before = block_exclusive_sum(total, of_warps);
  if (threadIdx.x < experts) {
    params.offsets[threadIdx.x] = before;
    params.tokens_per_expert[threadIdx.x] = total;
    if (threadIdx.x == experts - 1) params.offsets[experts] = before + total;
    for (int s = 0; s < segments; ++s) sums[s * experts + threadIdx.x] += before;
  }
  __syncthreads();
  if (segment >= segments) return;
  int32_t row = sums[threadIdx.x];
  for (int64_t block = first; block < end; ++block) {
    const int32_t count = params.histograms[block * experts + expert];
    params.histograms[block * experts + expert] = row;
    row += count;
  }
}

__global__ void __launch_bounds__(kThreads) moe_route_place_kernel(MoeRouteParams params) {
  ptx::grid_dependency_wait();
  const int64_t choice = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (choice >= params.num_tokens * params.top_k) return;
  const int64_t token = choice / params.top_k, block = token / kMoeRouteGpuBlock;
  const int32_t first = params.histograms[block * params.num_experts + params.expert_ids[choice]];
  const int32_t row = first + params.position[choice];
  params.position[choice] = row;
  params.source_token[row] = static_cast<int32_t>(token);
}

template <typename T, int kSlots>
const char* launch_choose(const MoeRouteParams& params, int64_t blocks, void* stream) {
  if constexpr (kSlots < kMaxExperts / kWarpSize) {
    if (params.num_experts > kSlots * kWarpSize) return launch_choose<T, kSlots * 2>(params, blocks, stream);
  }
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared_bytes(params)};
  return launch(moe_route_choose_kernel<T, kSlots>, shape, stream, params);
}

}  // namespace

const char* moe_route_forward_cuda(const MoeRouteParams& params, void* stream) {
  if (params.num_experts > kMaxExperts) return "at most 1024 experts on a GPU";
  const int64_t blocks = (params.num_tokens + kMoeRouteGpuBlock - 1) / kMoeRouteGpuBlock;
  const char* error = nullptr;
  if (blocks > 0) {
    error = dispatch_gpu_dtype(
        params.dtype, [&](auto tag) { return launch_choose<typename decltype(tag)::type, 1>(params, blocks, stream); });
  }
  if (error != nullptr || blocks == 1) return error;
  LaunchShape scan{dim3(1), dim3(kMaxExperts), (kMaxExperts + kWarpSize) * sizeof(int32_t)};
  scan.programmatic = blocks > 0;
  error = launch(moe_route_scan_kernel, scan, stream, params);
  if (error != nullptr || blocks == 0) return error;
  LaunchShape place{dim3(static_cast<unsigned>((params.num_tokens * params.top_k + kThreads - 1) / kThreads)),
                    kThreads};
  place.programmatic = true;
  return launch(moe_route_place_kernel, place, stream, params);
}

}  // namespace arfast
