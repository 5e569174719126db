// Contract of router_losses: sizes, strides (in elements) and pointers shared by the binding and the implementations.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"

namespace arfast {

// Over the n tokens that count, with p their softmax: balance = E sum_e f_e mean(p_e), z = mean(lse^2). f_e is how many
// of their choices fell on expert e, divided by n and by `divisor`. Statistics are float; double when dtype is
// kFloat64.
struct RouterLossesForwardParams {
  DType dtype;          // of router_logits
  int64_t num_tokens;   // T < 2^23
  int64_t num_experts;  // E
  int64_t top_k;        // K
  double divisor;
  const void* router_logits;  // [T, E]
  int64_t logits_stride;
  const int32_t* expert_ids;  // [T, K] or nullptr: no balance, then; ids out of range are no choices
  const bool* mask;           // [T] or nullptr: false for tokens that do not count, whose logits are not read
  float* balance;             // [1]
  float* z;                   // [1]
  float* fractions;           // [E], f - mean(f): the same gradient, which loses less where f is even
  float* lse;                 // [T], 0 for tokens that do not count
  int32_t* num_counted;       // [1], n; 0 before
  // Scratch of the CUDA implementation, 0 before but for squares.
  int32_t* choices;         // [E]
  uint64_t* probabilities;  // [E], sums in units of 2^-40
  float* squares;           // one for every kRouterLossesGpuBlock tokens
  int32_t* num_broken;      // [1], of the tokens that count those whose lse is not finite
  uint32_t* num_arrived;    // [1]
};

// drouter_logits = p_e / n (dbalance E (f_e - sum_j p_j f_j) + 2 dz lse), 0 for tokens that do not count.
struct RouterLossesBackwardParams {
  DType dtype;                // of router_logits and drouter_logits
  int64_t num_tokens;         // T
  int64_t num_experts;        // E
  const void* router_logits;  // [T, E]
  int64_t logits_stride;
  const bool* mask;            // [T] or nullptr
  const float* fractions;      // [E], f - mean(f)
  const float* lse;            // [T]
  const int32_t* num_counted;  // [1]
  const float* dbalance;       // [1] or nullptr
  const float* dz;             // [1] or nullptr
  void* drouter_logits;        // [T, E], dense
};

// Tokens of a block: fixed, so that the order of additions does not depend on the number of threads.
constexpr int64_t kRouterLossesBlock = 128;
constexpr int kRouterLossesGpuBlock = 32;

ARFAST_CPU_FUNCTION(router_losses_forward, RouterLossesForwardParams)
ARFAST_CPU_FUNCTION(router_losses_backward, RouterLossesBackwardParams)
ARFAST_CUDA_FUNCTION(router_losses_forward, RouterLossesForwardParams)
ARFAST_CUDA_FUNCTION(router_losses_backward, RouterLossesBackwardParams)

}  // namespace arfast
