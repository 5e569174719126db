// What the attention kernels on the GPU share: which rows a block has, what a query sees, and tiles of rows in shared
// memory that matrix fragments are read from.
#pragma once

#include "attention/attention.h"
#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "core/vector.cuh"

namespace arfast {

// The four lanes that hold a row of accumulators.
__device__ inline float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}
__device__ inline float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// The a operand of a product over 16 columns from accumulators: two tiles of 8 columns side by side.
template <typename T>
__device__ inline void fragment_from_accumulators(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  const auto pack = [](float x, float y) {
    return std::is_same_v<T, BFloat16> ? ptx::pack_bf16x2(x, y) : ptx::pack_f16x2(x, y);
  };
  a[0] = pack(low[0], low[1]);
  a[1] = pack(low[2], low[3]);
  a[2] = pack(high[0], high[1]);
  a[3] = pack(high[2], high[3]);
}

// Of sums of two positions none leaves the range of int.
constexpr int kMaxPositions = 1 << 29;

// Rows of one head.
template <typename T>
struct Rows {
  const T* first;
  int stride;
  __device__ Rows from(int row) const { return {first + int64_t{row} * stride, stride}; }
};

// The queries of a block: up to kQueries of one sequence, and the sequence they belong to. Positions in a sequence are
// below kMaxPositions, offsets in memory are not.
struct QueryTile {
  int batch;         // 0 when documents are packed
  int q_row, k_row;  // where the sequence begins in a packed q and k
  int seqlen_q, seqlen_k;
  int first_query;  // counted from the start of the sequence
  int num_queries;  // not above 0: there is no such tile
  bool padding;     // rows past the last document, which see nothing, not even the sink

  // Rows of a head from the tile's first query on, and all keys or values of the sequence.
  template <typename T>
  __device__ Rows<T> query_rows(const AttentionView& view, int head) const {
    return rows_of<T>(view, q_row + first_query, head);
  }
  template <typename T>
  __device__ Rows<T> key_rows(const AttentionView& view, int head) const {
    return rows_of<T>(view, k_row, head);
  }
  // The tile's first query in a dense [B, T, H, D] or [N, H, D], in elements.
  __device__ int64_t dense_index(const AttentionProblem& problem, int head) const {
    const int64_t before = batch * problem.num_queries + q_row + first_query;
    return (before * problem.num_heads + head) * problem.head_dim;
  }
  // In [B, H, T] or [H, N].
  __device__ int64_t statistic_index(const AttentionProblem& problem, int head) const {
    return (batch * problem.num_heads + head) * problem.num_queries + q_row + first_query;
  }

  template <typename T>
  __device__ Rows<T> rows_of(const AttentionView& view, int row, int head) const {
    const int64_t offset = batch * view.batch_stride + row * view.row_stride + head * view.head_stride;
    return {static_cast<const T*>(view.data) + offset, static_cast<int>(view.row_stride)};
  }
};

// Tiles of a launch. The documents' lengths are known to the GPU alone, so that of packed ones this is a bound: a
// document of n rows has at most n / kQueries + 1 tiles, and the rows past the last document are one more.
template <int kQueries>
inline int64_t num_query_tiles(const AttentionProblem& problem) {
  if (problem.cu_seqlens_q != nullptr) return problem.num_queries / kQueries + problem.batch + 1;
  return (problem.num_queries + kQueries - 1) / kQueries * problem.batch;
}

// The index-th tile of a launch. In a sequence the tiles with the most keys come first, so that the last blocks to run
// are short. All lanes of a warp call it alike.
template <int kQueries>
__device__ QueryTile find_query_tile(const AttentionProblem& problem, int64_t index) {
  const int queries = static_cast<int>(problem.num_queries);
  if (problem.cu_seqlens_q == nullptr) {
    const int tiles = (queries + kQueries - 1) / kQueries;
    const int first = (tiles - 1 - static_cast<int>(index / problem.batch)) * kQueries;
    return {static_cast<int>(index % problem.batch), 0, 0, queries, static_cast<int>(problem.num_keys), first,
            min(queries - first, kQueries)};
  }
  const int lane = threadIdx.x % kWarpSize, documents = static_cast<int>(problem.batch);
  const int32_t* ends = problem.cu_seqlens_q;
  int left = static_cast<int>(index);
  for (int document = lane; document - lane <= documents; document += kWarpSize) {
    const int begin = ends[min(document, documents)], end = document < documents ? ends[document + 1] : queries;
    const int up_to = warp_inclusive_sum(document <= documents ? (end - begin + kQueries - 1) / kQueries : 0);
    const unsigned after = __ballot_sync(0xffffffffu, up_to > left);
    if (after == 0) {
      left -= __shfl_sync(0xffffffffu, up_to, kWarpSize - 1);
      continue;
    }
    const int owner = __ffs(static_cast<int>(after)) - 1, found = document - lane + owner;
    const int q_row = __shfl_sync(0xffffffffu, begin, owner), seqlen_q = __shfl_sync(0xffffffffu, end, owner) - q_row;
    const int first = (__shfl_sync(0xffffffffu, up_to, owner) - 1 - left) * kQueries;
    const int k_row = found < documents ? problem.cu_seqlens_k[found] : 0;
    const int seqlen_k = found < documents ? problem.cu_seqlens_k[found + 1] - k_row : 0;
    return {0, q_row, k_row, seqlen_q, seqlen_k, first, min(seqlen_q - first, kQueries), found == documents};
  }
  return {};
}

// The keys that a query of the sequence sees: begin(query) <= key < end(query).
struct KeyRange {
  int first, last, seqlen_k;

  __device__ KeyRange(const AttentionProblem& problem, const QueryTile& tile) : seqlen_k(tile.seqlen_k) {
    const int aligned = tile.seqlen_k - tile.seqlen_q;  // the last query sees the last key
    last = problem.causal ? aligned : kMaxPositions;
    const int64_t window = problem.window >= 0 && problem.window < kMaxPositions ? problem.window : kMaxPositions;
    first = aligned - static_cast<int>(window);
  }
  __device__ int begin(int query) const { return max(query + first, 0); }
  __device__ int end(int query) const { return min(query + last + 1, seqlen_k); }
};

// Rows of a head in shared memory. The chunks of 16 bytes of a row are permuted by its number, within groups of 8, so
// that neither a row nor a column of chunks meets one bank twice.
template <typename T, int kRows, int kHeadDim>
struct alignas(1024) AttentionTile {
  static constexpr int kChunk = 8;                          // elements
  static constexpr int kPitch = (kHeadDim + 63) / 64 * 64;  // elements
  static constexpr int kChunks = kHeadDim / kChunk;
  T elements[kRows * kPitch];

  __device__ static int place(int row, int chunk) { return row * kPitch + (chunk ^ row % 8) * kChunk; }

  // Starts to copy `rows` rows of head_dim elements; the others become zero: weights of 0 do not protect from NaN.
  template <int kThreads>
  __device__ void load(const Rows<T>& source, int rows, int head_dim) {
    constexpr int kRowChunks = kPitch / kChunk, kStep = kThreads / kRowChunks;  // rows at a time
    static_assert(kStep % 8 == 0 && kRows % kStep == 0, "so that a thread's chunk is at one place in all its rows");
    const int chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
    if (chunk >= kChunks) return;
    const int size = max(0, min(head_dim - chunk * kChunk, kChunk));
    const bool aligned = is_aligned16(source.first) && source.stride % kChunk == 0;
    const T* from = source.first + int64_t{first} * source.stride + chunk * kChunk;
    T* to = elements + place(first, chunk);
#pragma unroll 1
    for (int row = first; row < kRows; row += kStep, from += kStep * source.stride, to += kStep * kPitch) {
      const int copied = row < rows ? size : 0;
      if (aligned) {
        const int bytes = copied * static_cast<int>(sizeof(T));
        ptx::cp_async16(ptx::shared_address(to), copied > 0 ? from : source.first, bytes);
      } else {
        *reinterpret_cast<Vector16<T>*>(to) = first_elements(from, copied);
      }
    }
  }

  // The first `count` elements of a chunk, then zeros.
  __device__ static Vector16<T> first_elements(const T* from, int count) {
    Vector16<T> chunk = filled_with<T>(0.0f);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < count) chunk.elements[i] = from[i];
    }
    return chunk;
  }

  // Where the calling lane reads its row of each fragment of 16 x 16 elements that begins in `row` and column 0.
  // Another one lies `rows` rows below and `k` times 16 columns to the right at fragment(address, rows, k).
  __device__ uint32_t lane_address(int row, int chunk) const {
    return ptx::shared_address(elements + place(row, chunk));
  }
  __device__ uint32_t a_address(int row) const {
    const int lane = threadIdx.x % kWarpSize;
    return lane_address(row + lane % 16, lane / 16);
  }
  // For b operands of the transposed matrix: columns [row, row + 8), then [row + 8, row + 16).
  __device__ uint32_t b_address(int row) const {
    const int lane = threadIdx.x % kWarpSize;
    return lane_address(row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  // For ldmatrix with transposition, as b operands of the matrix itself: its columns [0, 8), then [8, 16).
  __device__ uint32_t transposed_b_address(int row) const { return a_address(row); }

  __device__ static uint32_t fragment(uint32_t address, int rows, int k) {
    constexpr int kElement = sizeof(T);
    return (address ^ k * 16 * kElement) + rows * kPitch * kElement;  // columns are permuted by exclusive or
  }

  // Two neighbours of a row; `column` is even.
  __device__ void store_pair(int row, int column, float x, float y) {
    T* to = elements + place(row, column / kChunk) + column % kChunk;
    *reinterpret_cast<uint32_t*>(to) = std::is_same_v<T, BFloat16> ? ptx::pack_bf16x2(x, y) : ptx::pack_f16x2(x, y);
  }

  // Rows [first, first + rows) to out + row * stride, by one warp.
  __device__ void write_rows(T* out, int64_t stride, int first, int rows, int head_dim) const {
    const bool aligned = is_aligned16(out) && stride % kChunk == 0;
    for (int i = threadIdx.x % kWarpSize; i < rows * kChunks; i += kWarpSize) {
      const int row = first + i / kChunks, chunk = i % kChunks, size = min(head_dim - chunk * kChunk, kChunk);
      const Vector16<T> vector = *reinterpret_cast<const Vector16<T>*>(elements + place(row, chunk));
      T* to = out + row * stride + chunk * kChunk;
      if (aligned && size == kChunk) {
        *reinterpret_cast<Vector16<T>*>(to) = vector;
        continue;
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j < size) to[j] = vector.elements[j];
      }
    }
  }
};

}  // namespace arfast
