// Contract of moe_experts: sizes, strides (in elements) and pointers shared by the binding and the implementations.
// A row is one choice of one token, in the order that groups them by expert.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/dtype.h"
#include "core/matmul.h"

namespace arfast {

struct MoeExpertsShape {
  DType dtype;                // of hidden, the weights, out and their gradients
  int64_t num_tokens;         // T
  int64_t top_k;              // K
  int64_t num_experts;        // E
  int64_t hidden_size;        // d
  int64_t intermediate_size;  // I
  const int32_t* offsets;     // [E + 1]: the rows of each expert
  const int32_t* choices;     // [T * K]: the choice t * K + j behind each row, rising within an expert
  int64_t wave_rows;          // rows that the scratch memory has room for
  Matmul matmul;
};

// accumulator [T, d] is float (double for kFloat64); it is the output itself where the types agree.
struct MoeExpertsForwardParams {
  MoeExpertsShape shape;
  const void* hidden;  // [T, d]
  int64_t hidden_stride;
  const float* expert_weights;  // [T, K]; double for kFloat64
  void* w_gate_up;              // [E, 2 I, d], dense: gate rows, then up rows
  void* w_down;                 // [E, d, I], dense
  void* scratch;                // [wave_rows, 2 d + 3 I]
  void* accumulator;
  void* h;    // [T * K, 2 I] or nullptr: pre-activations, for the backward pass
  void* out;  // [T, d]
};

struct MoeExpertsBackwardParams {
  MoeExpertsShape shape;
  const void* dout;  // [T, d]
  int64_t dout_stride;
  const void* hidden;  // [T, d]
  int64_t hidden_stride;
  const float* expert_weights;  // [T, K]; double for kFloat64
  void* w_gate_up;              // [E, 2 I, d], dense
  void* w_down;                 // [E, d, I], dense
  const void* h;                // [T * K, 2 I], dense
  void* scratch;                // [wave_rows, 3 d + 3 I]
  void* accumulator;
  void* dhidden;           // [T, d] or nullptr
  float* dexpert_weights;  // [T, K]; double for kFloat64
  void* dw_gate_up;        // [E, 2 I, d] or nullptr
  void* dw_down;           // [E, d, I]; nullptr with dw_gate_up
};

// The rows that `rows` of an expert take in the scratch memory, the last ones zero: torch compiles a kernel for every
// new shape of a bfloat16 product, 0.3 ms each, and the counts change from step to step.
inline int64_t moe_padded_rows(int64_t rows) {
  const int64_t multiple = rows < 16 ? 1 : rows < 64 ? 4 : 16;
  return (rows + multiple - 1) / multiple * multiple;
}

ARFAST_CPU_FUNCTION(moe_experts_forward, MoeExpertsForwardParams)
ARFAST_CPU_FUNCTION(moe_experts_backward, MoeExpertsBackwardParams)

}  // namespace arfast
