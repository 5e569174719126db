// What the kernels of attention_decode on the GPU share: which keys and query rows a block has, where a cache holds
// them, and how parts of a softmax become one (Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1).
#pragma once

#include "attention/attention_cuda.cuh"
#include "attention/attention_decode.h"
#include "core/runtime.cuh"

namespace arfast {

// Values from the device that nobody has checked: nothing outside the cache is read whatever they are.
__device__ inline int sequence_length(const AttentionDecodeParams& params, int64_t sequence) {
  return max(0, min(params.seqlens[sequence], static_cast<int>(params.capacity)));
}
__device__ inline int cache_batch(const AttentionDecodeParams& params, int32_t index) {
  return max(0, min(index, static_cast<int>(params.cache_batch) - 1));
}

// Where both caches hold a position.
struct CacheRow {
  int batch, row;

  __device__ CacheRow(const AttentionDecodeParams& params, int sequence, int position)
      : batch(sequence), row(position) {
    const int64_t table_row = sequence * params.table_stride;
    if (params.block_table != nullptr) {
      const int page_size = static_cast<int>(params.page_size);
      batch = cache_batch(params, params.block_table[table_row + position / page_size]);
      row = position % page_size;
    } else if (params.beam_slots != nullptr) {
      batch = cache_batch(params, params.beam_slots[table_row + position]);
    }
  }
  template <typename T>
  __device__ const T* of(const HeadsView& view, int kv_head) const {
    const T* first = static_cast<const T*>(view.data) + kv_head * view.head_stride;  // the same for all rows of a block
    return first + (batch * view.batch_stride + row * view.row_stride);
  }
};

// Queries that share a key-value head: row t * group + g is query t of the group's head g.
struct DecodeRows {
  int group, count;

  __device__ explicit DecodeRows(const AttentionDecodeParams& params)
      : group(static_cast<int>(params.num_heads / params.num_kv_heads)),
        count(static_cast<int>(params.num_queries) * group) {}
  __device__ int query(int row) const { return row / group; }
  __device__ int head(int kv_head, int row) const { return kv_head * group + row % group; }
};

// What a block computes: rows [first_row, first_row + kRows) of those that share a key-value head, over a range of the
// keys of their sequence.
struct DecodeBlock {
  DecodeRows rows;
  int sequence, kv_head, first_row, split;
  int seqlen, begin, end;  // the range is [begin, end)
  int window;              // distance from a query to the last key that it sees
  bool exists;             // also of an empty sequence, whose output somebody has to write
  bool alone;              // the sequence has no other range

  template <int kRows>
  __device__ static DecodeBlock find(const AttentionDecodeParams& params, int64_t index) {
    DecodeBlock block{DecodeRows(params)};
    const int row_tiles = tiles_of<kRows>(block.rows.count);
    block.split = static_cast<int>(index % params.max_splits);
    index /= params.max_splits;
    block.first_row = static_cast<int>(index % row_tiles) * kRows;
    index /= row_tiles;
    block.kv_head = static_cast<int>(index % params.num_kv_heads);
    block.sequence = static_cast<int>(index / params.num_kv_heads);
    block.seqlen = sequence_length(params, block.sequence);
    const DecodeSplits splits(block.seqlen, params.num_queries, params.window, params.num_splits);
    block.window =
        static_cast<int>(params.window >= 0 && params.window < kMaxPositions ? params.window : kMaxPositions);
    block.exists = block.split < (splits.count > 0 ? splits.count : 1);
    block.alone = splits.count <= 1;
    block.begin = splits.count > 0 ? static_cast<int>(splits.begin(block.split)) : 0;
    block.end = splits.count > 0 ? static_cast<int>(splits.end(block.split)) : 0;
    return block;
  }

  // The position of a row's query, counted from first_row; negative if there is no such row.
  __device__ int position(const AttentionDecodeParams& params, int row) const {
    const int query = rows.query(first_row + row);
    return first_row + row < rows.count ? seqlen - static_cast<int>(params.num_queries) + query : -1;
  }
  // Whether a key of the range, or one past its end, is visible from a position.
  __device__ bool sees(int position, int key) const { return key < end && key <= position && position - key <= window; }

  template <typename T>
  __device__ const T* query(const AttentionDecodeParams& params, int row) const {
    return static_cast<const T*>(params.q.data) + sequence * params.q.batch_stride +
           rows.query(first_row + row) * params.q.row_stride +
           rows.head(kv_head, first_row + row) * params.q.head_stride;
  }
};

// From a score to an exponent of 2.
__device__ inline float score_scale(const AttentionDecodeParams& params) {
  return (params.softcap > 0 ? 1.0f : static_cast<float>(params.softmax_scale)) * kLog2E;
}

// The factor that turns a row's weighted sum of values into its output: 1 / the sum of all weights, the sink's too.
__device__ inline float output_factor(const AttentionDecodeParams& params, int head, float max, float sum) {
  const float scale = score_scale(params);
  const float sink = params.sink != nullptr ? static_cast<const float*>(params.sink)[head] * kLog2E : -INFINITY;
  if (sum == 0 && sink == -INFINITY) return 0;
  const float top = fmaxf(max * scale, sink);
  const float weight = ptx::exp2_approx(max * scale - top);
  return weight / (sum * weight + ptx::exp2_approx(sink - top));
}

// The partial result of a row of a range: the weighted sum of values [D], the maximal score, the sum of weights.
__device__ inline float* partial_of(const AttentionDecodeParams& params, int64_t sequence, int64_t kv_head,
                                    int64_t split, int64_t row) {
  const int64_t range = (sequence * params.num_kv_heads + kv_head) * params.max_splits + split;
  return static_cast<float*>(params.partial) + (range * DecodeRows(params).count + row) * (params.head_dim + 2);
}

template <typename T>
__device__ T* output_row(const AttentionDecodeParams& params, int sequence, int query, int head) {
  const int64_t row = (sequence * params.num_queries + query) * params.num_heads + head;
  return static_cast<T*>(params.out) + row * params.head_dim;
}

// Softmaxes of the same rows over different keys, each relative to its own maximum.
template <int kParts, int kRows, int kHeadDim>
struct SoftmaxParts {
  float sums[kParts][kRows][kHeadDim];  // of weighted values
  float max[kParts][kRows];             // of the scores
  float sum[kParts][kRows];             // of the weights

  // A row of all parts together, by a warp: the output if `out` is given, else the partial result.
  template <typename T>
  __device__ void merge(const AttentionDecodeParams& params, int row, int head, T* out, float* partial) const {
    const int head_dim = static_cast<int>(params.head_dim), lane = threadIdx.x % kWarpSize;
    const float scale = score_scale(params);
    float top = -INFINITY, total = 0, weights[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) top = fmaxf(top, max[part][row]);
    const float shift = top == -INFINITY ? 0.0f : top;  // a row that saw nothing: -inf - -inf would be NaN
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      weights[part] = ptx::exp2_approx((max[part][row] - shift) * scale);
      total += weights[part] * sum[part][row];
    }
    const float factor = out != nullptr ? output_factor(params, head, top, total) : 1.0f;
    for (int i = lane; i < head_dim; i += kWarpSize) {
      float value = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part) value += weights[part] * sums[part][row][i];
      if (out != nullptr) {
        out[i] = from_float<T>(factor == 0 ? 0.0f : value * factor);
      } else {
        partial[i] = value;
      }
    }
    if (out == nullptr && lane == 0) {
      partial[head_dim] = top;
      partial[head_dim + 1] = total;
    }
  }
};

// A block's rows: to `out` if its range is the only one, else as partial results.
template <typename T, int kThreads, int kParts, int kRows, int kHeadDim>
__device__ void write_rows(const AttentionDecodeParams& params, const DecodeBlock& block,
                           const SoftmaxParts<kParts, kRows, kHeadDim>& parts) {
  for (int row = threadIdx.x / kWarpSize; row < min(kRows, block.rows.count - block.first_row);
       row += kThreads / kWarpSize) {
    const int index = block.first_row + row, head = block.rows.head(block.kv_head, index);
    T* out = block.alone ? output_row<T>(params, block.sequence, block.rows.query(index), head) : nullptr;
    parts.merge(params, row, head, out, partial_of(params, block.sequence, block.kv_head, block.split, index));
  }
}

// The blocks of a launch: one for each range, were all as many as they can be, and kRows rows.
template <int kRows>
int64_t num_decode_blocks(const AttentionDecodeParams& params) {
  const int64_t rows = params.num_queries * params.num_heads / params.num_kv_heads;
  return params.batch * params.num_kv_heads * tiles_of<kRows>(rows) * params.max_splits;
}

template <int kRows, typename Smem, typename Kernel>
const char* launch_ranges(Kernel* kernel, int threads, const AttentionDecodeParams& params, void* stream) {
  const int64_t blocks = num_decode_blocks<kRows>(params);
  if (blocks > 0x7fffffff) return "batch, heads and splits must make fewer than 2^31 blocks";
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), sizeof(Smem)};
  return launch(kernel, shape, stream, params);
}

// Write `out` of the sequences with one range, partial results of the others.
const char* launch_decode_plain(const AttentionDecodeParams& params, void* stream);
const char* launch_decode_tensor_cores(const AttentionDecodeParams& params, void* stream);

}  // namespace arfast
