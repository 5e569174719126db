// Contract of attention: sizes, strides (in elements) and pointers shared by the binding, the CPU and the CUDA
// implementation.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"
#include "core/heads_view.h"

namespace arfast {

constexpr int64_t kAttentionMaxHeadDim = 256;

// What forward and backward pass share. Statistics (lse, sink and their gradients) are float, or double when dtype
// is kFloat64; [B, H, T] when dense, [H, N] when packed.
struct AttentionProblem {
  DType dtype;
  int64_t batch;                // B, or the number of packed documents
  int64_t num_queries;          // T, or the rows of a packed q
  int64_t num_keys;             // S, or the rows of a packed k
  int64_t num_heads;            // H
  int64_t num_kv_heads;         // Hkv
  int64_t head_dim;             // D
  const int32_t* cu_seqlens_q;  // [B + 1], or nullptr when dense
  const int32_t* cu_seqlens_k;  // [B + 1], or nullptr when dense
  double softmax_scale;
  double softcap;  // 0: none
  bool causal;
  int64_t window;  // keys to the left that a query sees besides its own; -1: all
  HeadsView q;
  HeadsView k;
  HeadsView v;
  const void* sink;  // [H] or nullptr
};

struct AttentionForwardParams {
  AttentionProblem problem;
  void* out;  // like q, dense
  void* lse;
};

// The head dimension that the kernels of a GPU work with, the channels beyond D being zero.
constexpr int64_t attention_padded_head_dim(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : 256;
}

// Memory of the backward pass on a GPU. All but row_terms begins with zeros.
struct AttentionBackwardWorkspace {
  float* row_terms;  // two for each element of lse
  float* dq_sums;    // [elements of lse, attention_padded_head_dim(D)]
  float* dp_sums;    // like lse, or nullptr without a sink
  uint32_t* turns;   // [1 + attention_turns()], or nullptr when the order of sums may change from run to run
};

// Tiles of queries of all heads, at least: a tile of any shape has this many queries or a multiple of them.
constexpr int64_t kFewestTileQueries = 32;
inline int64_t attention_turns(const AttentionProblem& problem) {
  const bool packed = problem.cu_seqlens_q != nullptr;
  const int64_t tiles = packed ? problem.num_queries / kFewestTileQueries + problem.batch
                               : problem.batch * ((problem.num_queries + kFewestTileQueries - 1) / kFewestTileQueries);
  return problem.num_heads * tiles;
}

struct AttentionBackwardParams {
  AttentionProblem problem;
  HeadsView out;
  HeadsView dout;
  const void* lse;
  const void* dlse;    // or nullptr
  int64_t key_splits;  // attention_key_splits()
  void* dq_partial;    // [key_splits, rows of q, H, D] in the dtype of lse, or nullptr when key_splits is 1
  AttentionBackwardWorkspace on_gpu;
  void* dq;  // like q, k, v, dense
  void* dk;
  void* dv;
  void* dsink;  // [H] or nullptr
};

// Into how many ranges of keys the backward pass on the CPU divides a sequence, so that a small batch still occupies
// several cores. A function of the sizes alone, not of the number of threads: results must not depend on that.
inline int64_t attention_key_splits(int64_t batch, int64_t num_kv_heads, int64_t num_keys) {
  constexpr int64_t kTasks = 8, kMinKeys = 256;
  const int64_t units = batch * num_kv_heads;
  if (units == 0 || units >= kTasks) return 1;
  const int64_t wished = (kTasks + units - 1) / units, possible = num_keys / kMinKeys;
  return possible < 1 ? 1 : (possible < wished ? possible : wished);
}

ARFAST_CPU_FUNCTION(attention_forward, AttentionForwardParams)
ARFAST_CPU_FUNCTION(attention_backward, AttentionBackwardParams)
ARFAST_CUDA_FUNCTION(attention_forward, AttentionForwardParams)
ARFAST_CUDA_FUNCTION(attention_backward, AttentionBackwardParams)

}  // namespace arfast
