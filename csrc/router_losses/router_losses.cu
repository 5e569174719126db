// The auxiliary losses of a router on the GPU, one launch each way. Forward: a block takes 32 tokens, a warp for their
// log-sum-exps and a thread per expert for the sums of its probabilities, integers whose order does not matter; the
// last block to finish makes the losses. Backward: a warp per token.
#include "core/last_block.cuh"
#include "core/reduce.cuh"
#include "core/runtime.cuh"
#include "core/vector.cuh"
#include "router_losses/router_losses.h"

namespace arfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTokens = kRouterLossesGpuBlock;
static_assert(kTokens == kWarpSize);  // a lane per token adds up their squares

struct Smem {
  float lse[kTokens];
  float max[kTokens];    // of the logits
  float scale[kTokens];  // 1 / sum exp(logit - max)
  int counts[kTokens];   // whether a token does
  float scratch[kWarps];
  bool is_last;
};

template <typename T>
__device__ const T* row_logits(const void* logits, int64_t stride, int64_t token) {
  return static_cast<const T*>(logits) + token * stride;
}

struct LogSumExp {
  float max;
  float sum;  // of exp(logit - max)
  __device__ float value() const { return fabsf(max) < INFINITY ? max + logf(sum) : max; }
};

template <typename T>
__device__ LogSumExp log_sum_exp(const T* logits, int64_t size) {
  float max = -INFINITY, sum = 0;
  bool has_nan = false;
  for (int64_t e = threadIdx.x % kWarpSize; e < size; e += kWarpSize) {
    const float x = to_float(logits[e]);
    max = fmaxf(max, x);
    has_nan |= x != x;
  }
  max = warp_max(max);
  if (__any_sync(0xffffffffu, has_nan)) max = NAN;
  for (int64_t e = threadIdx.x % kWarpSize; e < size; e += kWarpSize) sum += expf(to_float(logits[e]) - max);
  return {max, warp_sum(sum)};
}

template <typename T>
__device__ void scan_tokens(const RouterLossesForwardParams& params, int64_t first, Smem& smem) {
  const int lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x / kWarpSize; i < kTokens; i += kWarps) {
    const int64_t token = first + i;
    const bool counts = token < params.num_tokens && (params.mask == nullptr || params.mask[token]);
    LogSumExp lse{0, 1};
    if (counts) {
      lse = log_sum_exp(row_logits<T>(params.router_logits, params.logits_stride, token), params.num_experts);
    }
    if (lane == 0) {
      smem.lse[i] = lse.value();
      smem.max[i] = lse.max;
      smem.scale[i] = 1 / lse.sum;
      smem.counts[i] = counts;
      if (token < params.num_tokens) params.lse[token] = lse.value();
    }
  }
}

template <typename T>
__device__ void add_probabilities(const RouterLossesForwardParams& params, int64_t first, const Smem& smem) {
  for (int64_t e = threadIdx.x; e < params.num_experts; e += kThreads) {
    unsigned long long sum = 0;
    for (int i = 0; i < kTokens; ++i) {
      if (!smem.counts[i]) continue;
      const T* logits = row_logits<T>(params.router_logits, params.logits_stride, first + i);
      const float probability = expf(to_float(logits[e]) - smem.max[i]) * smem.scale[i];
      // A NaN is none of these; num_broken tells of it.
      if (probability <= 2) sum += static_cast<unsigned long long>(probability * 0x1p40f);
    }
    atomicAdd(reinterpret_cast<unsigned long long*>(params.probabilities) + e, sum);
  }
  for (int64_t j = threadIdx.x; j < kTokens * params.top_k; j += kThreads) {
    if (!smem.counts[j / params.top_k]) continue;
    const int32_t expert = params.expert_ids[first * params.top_k + j];
    if (expert >= 0 && expert < params.num_experts) atomicAdd(params.choices + expert, 1);
  }
}

__device__ void add_squares(const RouterLossesForwardParams& params, const Smem& smem) {
  const int lane = threadIdx.x;
  const float lse = smem.lse[lane];
  const float sum = warp_sum(lse * lse);
  const bool broken = smem.counts[lane] && !(fabsf(lse) < INFINITY);
  const int counted = __popc(__ballot_sync(0xffffffffu, smem.counts[lane]));
  const int num_broken = __popc(__ballot_sync(0xffffffffu, broken));
  if (lane != 0) return;
  params.squares[blockIdx.x] = sum;
  atomicAdd(params.num_counted, counted);
  if (num_broken > 0) atomicAdd(params.num_broken, num_broken);
}

__device__ void finish(const RouterLossesForwardParams& params, Smem& smem) {
  const int counted = *params.num_counted;
  const float count = static_cast<float>(counted > 0 ? counted : 1);
  float squares = 0, balance = 0, total = 0;
  for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) squares += params.squares[block];
  squares = block_sum<kThreads>(squares, smem.scratch);
  const auto fraction = [&](int64_t e) {
    return static_cast<float>(params.choices[e]) / (count * static_cast<float>(params.divisor));
  };
  for (int64_t e = threadIdx.x; e < params.num_experts; e += kThreads) {
    total += fraction(e);
    balance += fraction(e) * (static_cast<float>(params.probabilities[e]) * 0x1p-40f / count);
  }
  balance = block_sum<kThreads>(balance, smem.scratch);
  const float mean = block_sum<kThreads>(total, smem.scratch) / static_cast<float>(params.num_experts);
  for (int64_t e = threadIdx.x; e < params.num_experts; e += kThreads) params.fractions[e] = fraction(e) - mean;
  if (threadIdx.x != 0) return;
  *params.balance = *params.num_broken > 0 ? NAN : balance * static_cast<float>(params.num_experts);
  *params.z = squares / count;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) router_losses_forward_kernel(RouterLossesForwardParams params) {
  Smem& smem = shared_storage<Smem>();
  const int64_t first = blockIdx.x * int64_t{kTokens};
  scan_tokens<T>(params, first, smem);
  __syncthreads();
  if (params.expert_ids != nullptr) add_probabilities<T>(params, first, smem);
  if (threadIdx.x < kWarpSize) add_squares(params, smem);
  if (arrive_last(params.num_arrived, gridDim.x, smem.is_last)) finish(params, smem);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) router_losses_backward_kernel(RouterLossesBackwardParams params) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize, experts = params.num_experts;
  if (token >= params.num_tokens) return;
  T* dlogits = static_cast<T*>(params.drouter_logits) + token * experts;
  if (params.mask != nullptr && !params.mask[token]) {
    for (int64_t e = lane; e < experts; e += kWarpSize) dlogits[e] = from_float<T>(0);
    return;
  }
  const T* logits = row_logits<T>(params.router_logits, params.logits_stride, token);
  const float lse = params.lse[token], count = static_cast<float>(*params.num_counted);
  const float dz = params.dz != nullptr ? *params.dz / count : 0.0f;
  const float dbalance = params.dbalance != nullptr ? *params.dbalance * static_cast<float>(experts) / count : 0.0f;
  float dot = 0;
  for (int64_t e = lane; dbalance != 0 && e < experts; e += kWarpSize) {
    dot += expf(to_float(logits[e]) - lse) * params.fractions[e];
  }
  const float constant = dz * 2 * lse - dbalance * warp_sum(dot);
  for (int64_t e = lane; e < experts; e += kWarpSize) {
    const float factor = dbalance != 0 ? constant + dbalance * params.fractions[e] : constant;
    dlogits[e] = from_float<T>(expf(to_float(logits[e]) - lse) * factor);
  }
}

}  // namespace

const char* router_losses_forward_cuda(const RouterLossesForwardParams& params, void* stream) {
  const int64_t blocks = params.num_tokens == 0 ? 1 : (params.num_tokens + kTokens - 1) / kTokens;
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(Smem)};
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    return launch(router_losses_forward_kernel<typename decltype(tag)::type>, shape, stream, params);
  });
}

const char* router_losses_backward_cuda(const RouterLossesBackwardParams& params, void* stream) {
  if (params.num_tokens == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>((params.num_tokens + kWarps - 1) / kWarps));
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    return launch(router_losses_backward_kernel<typename decltype(tag)::type>, LaunchShape{grid, dim3(kThreads), 0},
                  stream, params);
  });
}

}  // namespace arfast
