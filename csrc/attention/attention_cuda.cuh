// What the attention kernels on the GPU share: which rows a block has, what a query sees, the running softmax.
#pragma once

#include <initializer_list>

#include "attention/attention.h"
#include "core/matrix_tile.cuh"
#include "core/runtime.cuh"
#include "core/segments.cuh"

namespace arfast {

constexpr int kRowLanes = 4;  // hold a row of accumulators

constexpr float kLog2E = 1.44269504f;

// Of sums of two positions none leaves the range of int.
constexpr int kMaxPositions = 1 << 29;

// The rows of a block, queries or keys of one sequence, and the sequence they belong to. Positions in a sequence are
// below kMaxPositions, offsets in memory are not.
struct SequenceTile {
  int batch;         // 0 when documents are packed
  int q_row, k_row;  // where the sequence begins in a packed q and k
  int seqlen_q, seqlen_k;
  int first;     // the tile's first row, counted from the start of the sequence
  int num_rows;  // not above 0: there is no such tile
  bool padding;  // rows past the last document, which see nothing, not even the sink
  int sequence;  // batch, or document

  // All rows of a head that belong to the sequence.
  template <typename T>
  __device__ MatrixRows<T> queries(const HeadsView& view, int head) const {
    return rows_of<T>(view, q_row, head);
  }
  template <typename T>
  __device__ MatrixRows<T> keys(const HeadsView& view, int head) const {
    return rows_of<T>(view, k_row, head);
  }
  // The sequence's first query in [B, H, T] or [H, N].
  __device__ int64_t statistic_index(const AttentionProblem& problem, int head) const {
    return (batch * problem.num_heads + head) * problem.num_queries + q_row;
  }

  template <typename T>
  __device__ MatrixRows<T> rows_of(const HeadsView& view, int row, int head) const {
    const int64_t offset = batch * view.batch_stride + row * view.row_stride + head * view.head_stride;
    return {static_cast<const T*>(view.data) + offset, static_cast<int>(view.row_stride)};
  }
};

// A dense tensor [B, rows, heads, D] or [N, heads, D] as a view.
__host__ __device__ inline HeadsView dense_view(const AttentionProblem& problem, void* data, int64_t rows,
                                                int64_t heads) {
  const int64_t row_stride = heads * problem.head_dim;
  return {data, problem.cu_seqlens_q == nullptr ? rows * row_stride : 0, row_stride, problem.head_dim};
}

// Tiles of a launch. The documents' lengths are known to the GPU alone, so that of packed ones this is a bound: a
// document of n rows has at most n / kRows + 1 tiles, and the rows past the last document are one more.
template <int kRows>
inline int64_t num_tiles(const AttentionProblem& problem, int64_t rows) {
  if (problem.cu_seqlens_q != nullptr) return rows / kRows + problem.batch + 1;
  return tiles_of<kRows>(rows) * problem.batch;
}

// The index-th tile of a launch over queries (kOverKeys: over keys). In a sequence the tiles with the most work come
// first, so that the last blocks to run are short; or, of keys, the last tiles. All lanes of a warp call it alike.
template <int kRows, bool kOverKeys>
__device__ SequenceTile find_tile(const AttentionProblem& problem, int64_t index, bool last_first = !kOverKeys) {
  const int queries = static_cast<int>(problem.num_queries), keys = static_cast<int>(problem.num_keys);
  const int rows = kOverKeys ? keys : queries;
  if (problem.cu_seqlens_q == nullptr) {
    const int tiles = tiles_of<kRows>(rows), number = static_cast<int>(index / problem.batch);
    const int first = (last_first ? tiles - 1 - number : number) * kRows;
    const int batch = static_cast<int>(index % problem.batch);
    return {batch, 0, 0, queries, keys, first, min(rows - first, kRows), false, batch};
  }
  const int documents = static_cast<int>(problem.batch);
  const auto document = [&](const int32_t* ends, int index, int num_rows) {
    return index < documents ? segment_at(ends, index, num_rows)
                             : Segment{max(0, min(ends[documents], num_rows)), num_rows};
  };
  const int32_t* ends = kOverKeys ? problem.cu_seqlens_k : problem.cu_seqlens_q;
  const SegmentTile found =
      find_segment_tile<kRows>(static_cast<int>(index), documents + 1, [&](int i) { return document(ends, i, rows); });
  if (found.segment < 0) return {};
  const int number = last_first ? tiles_of<kRows>(found.rows.size()) - 1 - found.number : found.number;
  const bool padding = found.segment == documents;
  Segment q = document(problem.cu_seqlens_q, found.segment, queries),
          k = document(problem.cu_seqlens_k, found.segment, keys);
  if (padding) (kOverKeys ? q : k) = {};
  const int first = number * kRows;
  return {0,       q.begin,      k.begin, q.size(), k.size(), first, min(found.rows.size() - first, kRows),
          padding, found.segment};
}

// Tiles [first, end) of a sequence; none if end is not above first.
struct TileRange {
  int first, end;
};

// The keys that a query of the sequence sees: begin(query) <= key < end(query).
struct KeyRange {
  int first, last;  // from a query to the first and the last key that it sees, whatever the lengths are
  int seqlen_q, seqlen_k;

  __host__ __device__ KeyRange(const AttentionProblem& problem, const SequenceTile& tile)
      : seqlen_q(tile.seqlen_q), seqlen_k(tile.seqlen_k) {
    const int aligned = seqlen_k - seqlen_q;  // the last query sees the last key
    last = problem.causal ? aligned : kMaxPositions;
    const int64_t window = problem.window >= 0 && problem.window < kMaxPositions ? problem.window : kMaxPositions;
    first = aligned - static_cast<int>(window);
  }
  __host__ __device__ int begin(int query) const { return max(query + first, 0); }
  __host__ __device__ int end(int query) const { return min(query + last + 1, seqlen_k); }
  // Whether one of these queries does not see one of these keys, all of which exist.
  __host__ __device__ bool hides(int first_query, int last_query, int first_key, int last_key) const {
    return first_key - last_query < first || last_key - first_query > last;
  }

  // The tiles of keys of which queries first_query to last_query see any.
  __host__ __device__ TileRange key_tiles(int tile, int first_query, int last_query) const {
    return {begin(first_query) / tile, (end(last_query) + tile - 1) / tile};
  }
  // Of the tiles of keys of which queries up to last_query see any, those after the one that begins with first_key.
  __host__ __device__ int later_key_tiles(int tile, int last_query, int first_key) const {
    return (end(last_query) - 1) / tile - first_key / tile;
  }
  // The tiles of queries of which any sees one of the keys first_key to last_key.
  __host__ __device__ TileRange query_tiles(int tile, int first_key, int last_key) const {
    const int end_query = min(last_key - first + 1, seqlen_q);
    return {max(first_key - last, 0) / tile, (end_query + tile - 1) / tile};
  }
};

// With an absolute error of some 1e-7, which is what matters to a score.
__device__ inline float tanh_approx(float x) { return 1 - __fdividef(2.0f, 1 + ptx::exp2_approx(x * 2.88539008f)); }

template <int kColumns>
__device__ inline void cap_scores(double softmax_scale, double softcap, float (&scores)[kColumns][4]) {
  const float cap = static_cast<float>(softcap), inner = static_cast<float>(softmax_scale / softcap);
#pragma unroll
  for (int i = 0; i < 4 * kColumns; ++i) scores[i / 4][i % 4] = cap * tanh_approx(scores[i / 4][i % 4] * inner);
}

// The running softmax of the rows of a thread: rows of quads of lanes, two per 16 queries.
template <int kRowTiles>
struct AttentionSoftmax {
  float max[kRowTiles][2];  // of the scores, unscaled unless there is a softcap
  float sum[kRowTiles][2];  // of this thread's columns
  float scale;              // from scores to exponents of 2

  // A sink is a key that every row has seen, with a value of 0: its score is the first maximum, and it counts once.
  __device__ AttentionSoftmax(double softmax_scale, double softcap, float sink) {
    const float unit = softcap > 0 ? 1.0f : static_cast<float>(softmax_scale);
    scale = unit * kLog2E;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      max[i / 2][i % 2] = sink / unit;
      sum[i / 2][i % 2] = sink > -INFINITY && threadIdx.x % 4 == 0 ? 1.0f : 0.0f;
    }
  }

  // Turns the scores of a row into weights. What was summed before counts as often as the result says.
  template <int kColumns>
  __device__ float update(int row_tile, int half, float (&scores)[kColumns][4]) {
    float top = max[row_tile][half];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    top = warp_max<kRowLanes>(top);
    const float shift = top == -INFINITY ? 0.0f : top * scale;  // a row that saw nothing: -inf - -inf would be NaN
    const float factor = ptx::exp2_approx(max[row_tile][half] * scale - shift);
    max[row_tile][half] = top;
    float total = sum[row_tile][half] * factor;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = ptx::exp2_approx(fmaf(scores[n][i], scale, -shift));
        total += scores[n][i];
      }
    }
    sum[row_tile][half] = total;
    return factor;
  }
};

// What the launchers of forward and backward pass refuse.
inline const char* refused(const AttentionProblem& problem) {
  if (problem.num_queries >= kMaxPositions || problem.num_keys >= kMaxPositions) {
    return "q and k must have fewer than 2^29 rows";
  }
  for (const HeadsView& view : {problem.q, problem.k, problem.v}) {
    if (view.row_stride > 0x7fffffff) return "q, k and v must have rows less than 2^31 elements apart";
  }
  return nullptr;
}

// A type as a value.
template <typename Type>
struct TypeOf {
  using type = Type;
};

// f of the first of the shapes whose shared memory a block may have.
template <typename Shape, typename... Smaller, typename F>
const char* with_first_that_fits(const F& f) {
  if constexpr (sizeof...(Smaller) > 0) {
    if (sizeof(typename Shape::Smem) > device_shared_bytes()) return with_first_that_fits<Smaller...>(f);
  }
  return f(TypeOf<Shape>{});
}

}  // namespace arfast
