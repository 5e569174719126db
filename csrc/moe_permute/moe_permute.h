// Contract of moe_permute and moe_combine: sizes, strides (in elements) and pointers shared by the bindings and the
// implementations. A row is one choice of one token, in the order that groups them by expert.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"

namespace arfast {

struct MoePermuteParams {
  DType dtype;                  // of hidden and out
  int64_t num_tokens;           // T
  int64_t num_rows;             // R
  int64_t hidden_size;          // d
  const void* hidden;           // [T, d]
  const int32_t* source_token;  // [R]: which row of hidden goes where
  int64_t hidden_stride;
  void* out;  // [R, d], dense
};

// Weights and their gradients are float; double when dtype is kFloat64.
struct MoeCombineParams {
  DType dtype;             // of expert_out and out
  int64_t num_tokens;      // T
  int64_t top_k;           // K
  int64_t hidden_size;     // d
  const void* expert_out;  // [T * K, d]
  int64_t expert_out_stride;
  const float* expert_weights;  // [T, K] or nullptr for 1
  const int32_t* position;      // [T, K]: the row of each choice
  void* out;                    // [T, d], dense
};

struct MoeCombineBackwardParams {
  DType dtype;             // of dout, expert_out and dexpert_out
  int64_t num_tokens;      // T
  int64_t top_k;           // K
  int64_t hidden_size;     // d
  const void* dout;        // [T, d]
  const void* expert_out;  // [T * K, d]
  int64_t dout_stride;
  int64_t expert_out_stride;
  const float* expert_weights;  // [T, K]
  const int32_t* position;      // [T, K]
  void* dexpert_out;            // [T * K, d], dense
  float* dexpert_weights;       // [T, K]
};

ARFAST_CPU_FUNCTION(moe_permute, MoePermuteParams)
ARFAST_CPU_FUNCTION(moe_combine_forward, MoeCombineParams)
ARFAST_CPU_FUNCTION(moe_combine_backward, MoeCombineBackwardParams)
ARFAST_CUDA_FUNCTION(moe_permute, MoePermuteParams)
ARFAST_CUDA_FUNCTION(moe_combine_forward, MoeCombineParams)
ARFAST_CUDA_FUNCTION(moe_combine_backward, MoeCombineBackwardParams)

}  // namespace arfast
