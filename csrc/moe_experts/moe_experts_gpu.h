// Contracts of the kernels that moe_experts has on a GPU beside grouped_mm's and moe_combine's. A row is one choice of
// one token, in the order that groups them by expert. Which rows an expert has and whose they are is known to the GPU
// alone.
#pragma once

#include <cstdint>

#include "core/cuda_function.h"
#include "core/dtype.h"

namespace arfast {

struct MoeRows {
  DType dtype;                  // of all tensors that are not said to be float
  int64_t num_tokens;           // T
  int64_t num_rows;             // R = T * K
  int64_t num_experts;          // E
  int64_t hidden_size;          // d
  int64_t intermediate_size;    // I
  const int32_t* offsets;       // [E + 1]: the rows of each expert
  const int32_t* source_token;  // [R]: the token of each row
};

// activation = silu(gate) * up with (gate, up) = h = hidden[source_token] w_gate_up[e]^T
struct MoeGateUpParams {
  MoeRows rows;
  const void* hidden;  // [T, d]
  int64_t hidden_stride;
  const void* w_gate_up;  // [E, 2 I, d], dense: gate rows, then up rows
  void* h;                // [R, 2 I] or nullptr
  void* activation;       // [R, I]
};

// With y = activation w_down[e]^T, out = sum of weight * y over the rows of a token, and da = dout[source_token]
// w_down[e]: dh is the gradient of h, and dweight = <da, activation>, so that nobody keeps y.
struct MoeDownBackwardParams {
  MoeRows rows;
  int64_t top_k;     // K
  const void* dout;  // [T, d]
  int64_t dout_stride;
  const void* w_down;           // [E, d, I], dense
  const void* h;                // [R, 2 I], dense
  const float* expert_weights;  // [T, K]
  const int32_t* position;      // [T, K]: the row of each choice
  void* dh;                     // [R, 2 I]
  void* weighted;               // [R, I]: weight * activation
  float* partial_dweights;      // [R, moe_column_tiles(I)], workspace
  float* dexpert_weights;       // [T, K]
};

// dweight[e] [m, n] = sum over the rows of e of a^T b; one of a and b has a row for each token, the other for each row.
struct MoeWeightGradientParams {
  MoeRows rows;
  bool a_by_token;  // else b
  const void* a;    // [T or R, m]
  const void* b;    // [R or T, n]
  int64_t a_stride, b_stride;
  int64_t num_rows, num_columns;  // m, n
  void* out;                      // [E, m, n]
};

// What the launchers refuse.
inline const char* refused(const MoeRows& rows) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (rows.num_rows >= kLimit || rows.hidden_size >= kLimit || rows.intermediate_size >= kLimit) {
    return "T * K, d and I must be below 2^30";
  }
  return nullptr;
}

constexpr int64_t kMoeColumnTile = 128;
constexpr int64_t moe_column_tiles(int64_t columns) { return (columns + kMoeColumnTile - 1) / kMoeColumnTile; }

ARFAST_CUDA_FUNCTION(moe_gate_up, MoeGateUpParams)
ARFAST_CUDA_FUNCTION(moe_down_backward, MoeDownBackwardParams)
ARFAST_CUDA_FUNCTION(moe_weight_gradient, MoeWeightGradientParams)

}  // namespace arfast
