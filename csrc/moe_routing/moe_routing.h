// Contract of moe_route: sizes, strides (in elements) and pointers shared by the binding and the implementations.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"

namespace arfast {

// Statistics, weights and their gradients are float; double when dtype is kFloat64.
struct MoeRouteParams {
  DType dtype;          // of router_logits
  int64_t num_tokens;   // T
  int64_t num_experts;  // E
  int64_t top_k;        // K
  bool sigmoid;         // the score of a logit: sigmoid, else softmax over the row
  bool renormalize;     // divide the K scores by their sum
  int64_t num_groups;   // 1: no group limit
  int64_t top_groups;
  double scale;
  const void* router_logits;  // [T, E]
  int64_t logits_stride;
  const float* bias;           // [E] or nullptr: added to the scores for the choice alone
  int32_t* expert_ids;         // [T, K], best first
  float* expert_weights;       // [T, K]
  int32_t* tokens_per_expert;  // [E]
  int32_t* offsets;            // [E + 1]: where each expert's rows begin in the order sorted by expert
  int32_t* source_token;       // [T * K]: the token of each row in that order
  int32_t* position;           // [T, K]: the row of each choice in that order
  float* lse;                  // [T]: log-sum-exp of the logits
  int32_t* histograms;         // [num_blocks, E], scratch: one row per kMoeRouteBlock (kMoeRouteGpuBlock) tokens
};

// Gradients of one row, in closed form. With p the softmax, s the sigmoid and S the sum over the chosen experts:
//   softmax:              dlogit_e = p_e (g_e - sum_j p_j g_j), g = scale * dweight on the chosen, else 0
//   softmax renormalised: dlogit_j = w_j (dw_j - sum_i w_i dw_i / scale) on the chosen, else 0
//   sigmoid:              dlogit_j = scale * dw_j s_j (1 - s_j)
//   sigmoid renormalised: dlogit_j = (scale * dw_j - sum_i w_i dw_i) / S * s_j (1 - s_j)
// and dlse adds dlse * p_e to every expert.
struct MoeRouteBackwardParams {
  DType dtype;          // of router_logits and drouter_logits
  int64_t num_tokens;   // T
  int64_t num_experts;  // E
  int64_t top_k;        // K
  bool sigmoid;
  bool renormalize;
  double scale;
  const void* router_logits;  // [T, E]
  int64_t logits_stride;
  const int32_t* expert_ids;     // [T, K]
  const float* expert_weights;   // [T, K]
  const float* lse;              // [T]
  const float* dexpert_weights;  // [T, K] or nullptr
  const float* dlse;             // [T] or nullptr
  void* drouter_logits;          // [T, E], dense
};

// Tokens per histogram of the counting sort. Fixed, so that the order does not depend on the number of threads.
constexpr int64_t kMoeRouteBlock = 128;
constexpr int kMoeRouteGpuBlock = 32;
// Keeps renormalised sigmoid scores finite when all of them are zero, as DeepSeek-V3 does.
constexpr double kSigmoidEps = 1e-20;

ARFAST_CPU_FUNCTION(moe_route_forward, MoeRouteParams)
ARFAST_CPU_FUNCTION(moe_route_backward, MoeRouteBackwardParams)
ARFAST_CUDA_FUNCTION(moe_route_forward, MoeRouteParams)
ARFAST_CUDA_FUNCTION(moe_route_backward, MoeRouteBackwardParams)

}  // namespace arfast
