// Contract of cross_entropy: one pass over rows of logits that gives the loss, its log-sum-exp and its gradient.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/dtype.h"

namespace arfast {

// Row i with target y, z' = softcap * tanh(z / softcap) (z' = z without softcap), lse = log(sum exp z'), eps =
// label_smoothing, class weights w (1 without), W = sum of w:
//   ce_i     = (1 - eps) w_y (lse - z'_y) + eps / V (W lse - sum_v w_v z'_v)
//   z_loss_i = z_loss lse^2
// An ignored row has both 0, and a gradient of 0.
struct CrossEntropyParams {
  DType dtype;         // of logits and dlogits; float quantities below are double when it is kFloat64
  int64_t num_rows;    // N
  int64_t vocab_size;  // V
  const void* logits;  // [N, V]
  int64_t logits_stride;
  const int64_t* targets;  // [N]
  int64_t ignore_index;
  const float* weight;  // [V] or nullptr
  double weight_sum;    // W
  double label_smoothing;
  double z_loss;
  double softcap;          // 0: none
  double ce_scale;         // the gradient of ce_i, before row_scale
  double z_scale;          // the gradient of z_loss_i, before row_scale
  const float* row_scale;  // [N] or nullptr: an upstream gradient per row
  float* ce;               // [N], or nullptr when only the gradient is asked for
  float* z;                // [N]: z_loss_i; nullptr with ce
  // [N, 2]: the maximum m of z' and log(sum exp(z' - m)). Apart, since their sum, rounded, would cost p a factor of lse
  // in accuracy. Written with ce, read without; 0 for an ignored row.
  float* statistics;
  void* dlogits;  // [N, V] or nullptr; may be logits itself
  int64_t dlogits_stride;
};

ARFAST_CPU_FUNCTION(cross_entropy, CrossEntropyParams)

}  // namespace arfast
