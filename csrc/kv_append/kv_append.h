// Contract of kv_append: sizes, strides (in elements) and pointers shared by the binding, the CPU and the CUDA
// implementation.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"
#include "core/heads_view.h"

namespace arfast {

struct KVAppendParams {
  DType dtype;                 // of q, k, v, the caches and out
  int64_t batch;               // B
  int64_t num_tokens;          // T, the last positions of every sequence
  int64_t num_heads;           // H
  int64_t num_kv_heads;        // Hkv
  int64_t head_dim;            // D, even
  int64_t table_rows;          // P: row b * T + t of q and k uses row (b * T + t) % P
  HeadsView q;                 // [B, T, H, D]
  HeadsView k;                 // [B, T, Hkv, D]
  HeadsView v;                 // [B, T, Hkv, D]
  const float* cos;            // [P, D / 2], dense
  const float* sin;            // [P, D / 2], dense
  HeadsView k_cache;           // [B, S_max, Hkv, D]; paged: [pages, page, Hkv, D], a page being a batch
  HeadsView v_cache;           // like k_cache
  const int32_t* seqlens;      // [B]
  const int32_t* block_table;  // [B, pages per sequence], dense, or nullptr
  const int32_t* beam_slots;   // [B, S_max], dense, or nullptr
  int64_t table_stride;        // rows of block_table or beam_slots
  int64_t page_size;           // tokens per batch index of a cache
  int64_t capacity;            // tokens that a sequence can have in the cache
  int64_t cache_batch;         // batch indices of a cache
  void* out;                   // [B, T, H, D], dense: q, rotated
};

// Where a token goes in the caches. A batch below 0: nowhere, it has no place there (the binding for the CPU refuses).
struct KVSlot {
  int64_t batch, row;
};

constexpr KVSlot slot_of(const KVAppendParams& params, int64_t sequence, int64_t token) {
  const int64_t position = params.seqlens[sequence] - params.num_tokens + token;
  if (position < 0 || position >= params.capacity) return {-1, 0};
  const int64_t table_row = sequence * params.table_stride;
  if (params.block_table != nullptr) {
    const int64_t page = params.block_table[table_row + position / params.page_size];
    return {page < params.cache_batch ? page : -1, position % params.page_size};
  }
  if (params.beam_slots == nullptr) return {sequence, position};
  const int64_t slot = params.beam_slots[table_row + position];
  return {slot < params.cache_batch ? slot : -1, position};
}

ARFAST_CPU_FUNCTION(kv_append, KVAppendParams)
ARFAST_CUDA_FUNCTION(kv_append, KVAppendParams)

}  // namespace arfast
