// Contract of attention_decode: sizes, strides (in elements) and pointers shared by the binding, the CPU and the CUDA
// implementation.
#pragma once

#include "attention/attention.h"

namespace arfast {

// The kernels of the GPU: products on its plain cores or on its tensor cores.
enum class DecodeKernel : int64_t { kChoose, kPlain, kTensorCores };

struct AttentionDecodeParams {
  DType dtype;           // of q, the caches and out
  int64_t batch;         // B
  int64_t num_queries;   // Tq, the last positions of every sequence
  int64_t num_heads;     // H
  int64_t num_kv_heads;  // Hkv
  int64_t head_dim;      // D
  double softmax_scale;
  double softcap;              // 0: none
  int64_t window;              // -1: all
  HeadsView q;                 // [B, Tq, H, D]
  HeadsView k;                 // [B, S_max, Hkv, D]; paged: [pages, page, Hkv, D], a page being a batch
  HeadsView v;                 // like k
  const void* sink;            // [H] in float (double for kFloat64), or nullptr
  const int32_t* seqlens;      // [B]
  const int32_t* block_table;  // [B, pages per sequence], dense, or nullptr
  const int32_t* beam_slots;   // [B, S_max], dense, or nullptr
  int64_t table_stride;        // rows of block_table or beam_slots
  int64_t page_size;           // keys per batch index of a cache
  int64_t capacity;            // keys that a sequence can have in the cache
  int64_t cache_batch;         // batch indices of a cache
  int64_t num_splits;          // 0: ranges of kDecodeSplit keys
  int64_t max_splits;          // the most ranges that a sequence of this call has
  DecodeKernel kernel;         // of the GPU
  void* partial;  // [B, Hkv, max_splits, Tq * H / Hkv, D + 2] in float (double), workspace: sums, maximum, weight
  void* out;      // [B, Tq, H, D], dense
};

constexpr int64_t kDecodeTile = 64;    // keys that are packed and multiplied at a time
constexpr int64_t kDecodeSplit = 512;  // keys of a task, unless the caller asks for a number of splits

// Both kernels read a key once for all query rows that share it. Tensor cores multiply 16 rows at a time, as many as
// there are or not, and every step of theirs waits for the whole block. Plain arithmetic grows with the rows: by count
// of its instructions, not by measurement, up to 3 rows hide behind the reading on an H200. The batch has no say: it
// must not change a sequence's result.
constexpr DecodeKernel choose_decode_kernel(DType dtype, int64_t num_queries, int64_t group) {
  constexpr int64_t kTensorCoreRows = 4;
  const bool sixteen_bits = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  return sixteen_bits && num_queries * group >= kTensorCoreRows ? DecodeKernel::kTensorCores : DecodeKernel::kPlain;
}

// The ranges of keys that a sequence is divided into, from `first` on, where the oldest query's window begins. A
// function of this sequence alone, so that neither the batch around it nor the number of threads changes its result.
struct DecodeSplits {
  int64_t first = 0, seqlen;
  int64_t keys = kDecodeSplit;  // per range, a multiple of the tile; ranges begin at its multiples
  int64_t count = 0;            // 0 for an empty sequence

  constexpr DecodeSplits(int64_t seqlen_, int64_t num_queries, int64_t window, int64_t num_splits) : seqlen(seqlen_) {
    const int64_t oldest = seqlen - num_queries - window;
    first = window >= 0 && oldest > 0 ? oldest : 0;
    if (num_splits > 0) keys = ((seqlen - 1) / num_splits / kDecodeTile + 1) * kDecodeTile;
    count = seqlen > 0 ? (seqlen - 1) / keys - first / keys + 1 : 0;
  }
  constexpr int64_t begin(int64_t split) const {
    const int64_t key = (first / keys + split) * keys;
    return key > first ? key : first;
  }
  constexpr int64_t end(int64_t split) const {
    const int64_t key = (first / keys + split + 1) * keys;
    return key < seqlen ? key : seqlen;
  }
};

// A bound on the ranges of a sequence of at most `capacity` keys, whatever its length.
constexpr int64_t most_decode_splits(int64_t capacity, int64_t num_queries, int64_t window, int64_t num_splits) {
  if (num_splits > 0) return num_splits < capacity / kDecodeTile + 1 ? num_splits : capacity / kDecodeTile + 1;
  int64_t keys = capacity;
  if (window >= 0 && window < keys - num_queries) keys = window + num_queries;  // they may begin anywhere
  return keys / kDecodeSplit + 2;
}

ARFAST_CPU_FUNCTION(attention_decode, AttentionDecodeParams)
ARFAST_CUDA_FUNCTION(attention_decode, AttentionDecodeParams)

}  // namespace arfast
