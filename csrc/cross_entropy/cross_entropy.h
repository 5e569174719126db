// Contract of cross_entropy: rows of logits give their loss, their log-sum-exp and their gradient.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"

namespace arfast {

enum Reduction : int64_t { kReductionNone, kReductionMean, kReductionSum };

// What all rows share. The loss is ce_scale * sum of ce_i + z_scale * sum of z_loss_i.
struct CrossEntropyTotals {
  double weight_sum;  // W: of all classes; V without class weights
  double ce_scale;    // 1, or 1 / the denominator of the mean
  double z_scale;
};

struct CrossEntropyTotalsParams {
  DType dtype;             // of the logits: class weights are float, double for kFloat64
  int64_t num_rows;        // N
  int64_t vocab_size;      // V
  const int64_t* targets;  // [N]
  int64_t ignore_index;
  const float* weight;  // [V] or nullptr
  int64_t reduction;
  double num_items;  // the denominator of the mean; 0: the rows that count, by their class weights
  CrossEntropyTotals* totals;
};

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
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none
  const CrossEntropyTotals* totals;
  const float* row_scale;  // [N] or nullptr: an upstream gradient per row
  float* ce;               // [N], or nullptr when only the gradient is asked for
  float* z;                // [N]: z_loss_i; nullptr with ce
  // [N, 2]: the maximum m of z' and log(sum exp(z' - m)). Apart, since their sum, rounded, would cost p a factor of lse
  // in accuracy. Written with ce, read without; 0 for an ignored row.
  float* statistics;
  void* dlogits;  // [N, V] or nullptr; may be logits itself
  int64_t dlogits_stride;
};

struct CrossEntropyReduceParams {
  DType dtype;       // of the logits: the losses are float, double for kFloat64
  int64_t num_rows;  // N
  const float* ce;   // [N]
  const float* z;    // [N]
  const CrossEntropyTotals* totals;
  int64_t reduction;
  float* loss;  // [N] for kReductionNone, else []
};

ARFAST_CPU_FUNCTION(cross_entropy_totals, CrossEntropyTotalsParams)
ARFAST_CPU_FUNCTION(cross_entropy, CrossEntropyParams)
ARFAST_CPU_FUNCTION(cross_entropy_reduce, CrossEntropyReduceParams)
ARFAST_CUDA_FUNCTION(cross_entropy_totals, CrossEntropyTotalsParams)
ARFAST_CUDA_FUNCTION(cross_entropy, CrossEntropyParams)
ARFAST_CUDA_FUNCTION(cross_entropy_reduce, CrossEntropyReduceParams)

}  // namespace arfast
