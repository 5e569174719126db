// Contract of decode_step: sizes, strides (in elements) and pointers shared by the binding and the CPU implementation.
// There is none for a GPU, where a CUDA graph of the model's own kernels does this.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/dtype.h"
#include "core/logits_tiles.h"

namespace arfast {

// The weights of a layer, dense, in the dtype of the model; nullptr: the model has none.
struct DecodeStepLayer {
  const void* input_norm;  // [d]
  const void* q;           // [H D, d]
  const void* k;           // [Hkv D, d]
  const void* v;           // [Hkv D, d]
  const void* o;           // [d, H D]
  const void* post_norm;   // [d]
  const void* gate;        // [I, d]
  const void* up;          // [I, d]
  const void* down;        // [d, I]
  const void* q_bias;      // [H D]
  const void* k_bias;      // [Hkv D]
  const void* v_bias;      // [Hkv D]
  const void* o_bias;      // [d]
  const void* q_norm;      // [D]
  const void* k_norm;      // [D]
  int64_t window;          // -1: all
};

// A cache whose channels are dense: [L, rows, S, Hkv, D].
struct DecodeStepCache {
  void* data;
  int64_t layer_stride;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

struct DecodeStepParams {
  DType dtype;                // of the weights, the caches and the logits; float32, bfloat16 or float16
  int64_t batch;              // B
  int64_t num_tokens;         // T, the last positions of every sequence
  int64_t hidden_size;        // d
  int64_t intermediate_size;  // I
  int64_t vocab_size;         // V
  int64_t num_layers;         // L
  int64_t num_heads;          // H
  int64_t num_kv_heads;       // Hkv
  int64_t head_dim;           // D, even
  double eps;
  const int64_t* tokens;          // [B, T]
  const void* embedding;          // [V, d]
  const DecodeStepLayer* layers;  // [L]
  const void* norm;               // [d]
  const void* head;               // [V, d]
  const float* cos;               // [positions, D / 2], dense
  const float* sin;               // [positions, D / 2], dense
  DecodeStepCache k_cache;
  DecodeStepCache v_cache;
  const int32_t* seqlens;     // [B], the new tokens included
  const int32_t* beam_slots;  // [B, S]: position p of sequence b is at [beam_slots[b, p], p]; nullptr: at [b, p]
  int64_t slots_stride;       // of a row of beam_slots
  int64_t num_threads;        // that are there to share the work; no result depends on it
  void* logits;               // [B, T, V], dense
  float* tile_sums;           // [2, tiles, B, T]: see core/logits_tiles.h; nullptr: not wanted
};

ARFAST_CPU_FUNCTION(decode_step, DecodeStepParams)

}  // namespace arfast
