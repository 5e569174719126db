// Gradient of the router logits on the GPU, in the closed form of moe_routing.h: a warp per token.
#include "core/reduce.cuh"
#include "core/runtime.cuh"
#include "core/vector.cuh"
#include "moe_routing/moe_routing.h"

namespace arfast {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = kThreads / kWarpSize;

template <typename T>
__global__ void __launch_bounds__(kThreads) moe_route_backward_kernel(MoeRouteBackwardParams params) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = blockIdx.x * int64_t{kTokens} + threadIdx.x / kWarpSize;
  if (token >= params.num_tokens) return;
  const T* logits = static_cast<const T*>(params.router_logits) + token * params.logits_stride;
  T* dlogits = static_cast<T*>(params.drouter_logits) + token * params.num_experts;
  const int32_t* ids = params.expert_ids + token * params.top_k;
  const float* weights = params.expert_weights + token * params.top_k;
  const float* dweights = params.dexpert_weights != nullptr ? params.dexpert_weights + token * params.top_k : nullptr;
  const int64_t top_k = dweights != nullptr ? params.top_k : 0;
  const float lse = params.lse[token], scale = static_cast<float>(params.scale);

  float dot = 0, sum = 0;
  for (int64_t j = lane; j < top_k; j += kWarpSize) {
    dot += weights[j] * dweights[j];
    if (params.sigmoid) sum += sigmoid(to_float(logits[ids[j]]));
  }
  dot = warp_sum(dot);
  sum = warp_sum(sum) + static_cast<float>(kSigmoidEps);
  const bool dense = params.dlse != nullptr || !(params.sigmoid || params.renormalize);
  float coefficient = params.dlse != nullptr ? params.dlse[token] : 0.0f;
  if (!params.sigmoid && !params.renormalize) coefficient -= dot;
  for (int64_t e = lane; e < params.num_experts; e += kWarpSize) {
    dlogits[e] = from_float<T>(dense ? coefficient * expf(to_float(logits[e]) - lse) : 0.0f);
  }
  __syncwarp();
  for (int64_t j = lane; j < top_k; j += kWarpSize) {
    const float logit = to_float(logits[ids[j]]);
    float gradient = weights[j] * (params.renormalize ? dweights[j] - dot / scale : dweights[j]);
    if (params.sigmoid) {
      const float s = sigmoid(logit);
      gradient = s * (1 - s) * (params.renormalize ? (scale * dweights[j] - dot) / sum : scale * dweights[j]);
    }
    // From the float value: adding to the stored element would round twice.
    if (dense) gradient += coefficient * expf(logit - lse);
    dlogits[ids[j]] = from_float<T>(gradient);
  }
}

}  // namespace

const char* moe_route_backward_cuda(const MoeRouteBackwardParams& params, void* stream) {
  if (params.num_tokens == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>((params.num_tokens + kTokens - 1) / kTokens));
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    return launch(moe_route_backward_kernel<typename decltype(tag)::type>, LaunchShape{grid, dim3(kThreads), 0}, stream,
                  params);
  });
}

}  // namespace arfast
