// Where the rows of a problem lie, and which part of a tile its mask leaves visible. Queries lie along the vector
// lanes.
#pragma once

#include "attention/attention.h"
#include "attention/attention_tile.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// Multiply-adds that take as long as touching one element of memory, for run_tasks.
constexpr int64_t kMultiplyAddsPerElement = 16;

// Key j is visible to query i when i + first <= j <= i + last (both count from the start of their sequence).
struct Visibility {
  int64_t first, last;

  Visibility(const AttentionProblem& problem, int64_t seqlen_q, int64_t seqlen_k) {
    constexpr int64_t kUnbounded = int64_t{1} << 40;
    last = problem.causal ? seqlen_k - seqlen_q : kUnbounded;
    first = problem.window >= 0 ? seqlen_k - seqlen_q - problem.window : -kUnbounded;
  }
  int64_t key_begin(int64_t query) const { return std::max<int64_t>(0, query + first); }
  int64_t key_end(int64_t last_query, int64_t seqlen_k) const { return std::min(seqlen_k, last_query + last + 1); }
  // Queries before it see nothing.
  int64_t query_begin(int64_t seqlen_q, int64_t seqlen_k) const {
    return seqlen_k == 0 ? seqlen_q : std::clamp<int64_t>(-last, 0, seqlen_q);
  }
};

// A run of keys of a tile together with the lanes that see any of them; masked: some of those lanes do not see all.
struct Band {
  int64_t key_begin, key_end;    // counted from the start of the tile
  int64_t lane_begin, lane_end;  // multiples of the lanes of a vector
  bool masked;
};
constexpr int64_t kBandKeys = 16;

// The visible part of keys [key, key + num_keys) for the queries [query, query + num_queries), which lie along the
// lanes. Returns the number of bands, at most ceil(num_keys / kBandKeys).
template <typename A>
int find_bands(const Visibility& visible, int64_t query, int64_t num_queries, int64_t key, int64_t num_keys,
               Band* bands) {
  int count = 0;
  for (int64_t begin = 0; begin < num_keys; begin += kBandKeys) {
    const int64_t end = std::min(begin + kBandKeys, num_keys);
    const int64_t first = std::max<int64_t>(0, key + begin - visible.last - query);
    const int64_t last = std::min(num_queries - 1, key + end - 1 - visible.first - query);
    if (first > last) continue;
    Band band{begin, end, first / kLanes<A> * kLanes<A>, (last / kLanes<A> + 1) * kLanes<A>, false};
    const int64_t last_lane = std::min(band.lane_end, num_queries) - 1;
    band.masked =
        key + end - 1 > query + band.lane_begin + visible.last || key + begin < query + last_lane + visible.first;
    Band* previous = count > 0 ? bands + count - 1 : nullptr;
    if (previous != nullptr && !previous->masked && !band.masked && previous->key_end == begin &&
        previous->lane_begin == band.lane_begin && previous->lane_end == band.lane_end) {
      previous->key_end = end;
    } else {
      bands[count++] = band;
    }
  }
  return count;
}

// Lanes of the vector that starts at `query` which see `key`.
template <typename A>
inline auto visible_lanes(const Visibility& visible, int64_t query, int64_t key) {
  return lanes_between<A>(key - visible.last - query, key - visible.first - query);
}

// One sequence of the batch: the rows of q and k that it occupies.
struct Sequence {
  int64_t batch, q_row, k_row, seqlen_q, seqlen_k;

  Sequence(const AttentionProblem& problem, int64_t index) : batch(index), q_row(0), k_row(0) {
    seqlen_q = problem.num_queries;
    seqlen_k = problem.num_keys;
    if (problem.cu_seqlens_q == nullptr) return;
    q_row = problem.cu_seqlens_q[index];
    k_row = problem.cu_seqlens_k[index];
    seqlen_q = problem.cu_seqlens_q[index + 1] - q_row;
    seqlen_k = problem.cu_seqlens_k[index + 1] - k_row;
  }
};

// Rows of one head, from `row` on.
template <typename T>
inline StridedRows<T> rows_of(const HeadsView& view, int64_t batch, int64_t row, int64_t head) {
  const int64_t offset = batch * view.batch_stride + row * view.row_stride + head * view.head_stride;
  return {static_cast<const T*>(view.data) + offset, view.row_stride};
}

// Where a row's statistics lie: [B, H, T] when dense, [H, N] when packed.
inline int64_t statistic_index(const AttentionProblem& problem, int64_t batch, int64_t row, int64_t head) {
  const int64_t leading = problem.cu_seqlens_q == nullptr ? batch * problem.num_heads + head : head;
  return leading * problem.num_queries + row;
}

// Where a row lies in a dense tensor [B, rows, heads, D] or [rows, heads, D].
inline int64_t dense_index(const AttentionProblem& problem, int64_t batch, int64_t row, int64_t head, int64_t rows,
                           int64_t heads) {
  const int64_t leading = problem.cu_seqlens_q == nullptr ? batch * rows + row : row;
  return (leading * heads + head) * problem.head_dim;
}

}  // namespace
}  // namespace arfast::ARFAST_CPU_TARGET
