// Attention of a few new queries to a long cache on the CPU: bound by memory, so keys and values are read once per
// group of query heads. A task is a range of keys of one key-value head; the partial softmaxes of the ranges are merged
// in their order (Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1).
#include <cmath>
#include <vector>

#include "attention/attention_decode.h"
#include "attention/attention_tile.h"
#include "core/cached_attention.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

constexpr double kLog2E = 1.4426950408889634;
static_assert(kDecodeTile == kCachedTile);

struct Range {
  int64_t sequence, kv_head, split, begin, end;
};

// Queries that share a key-value head are rows: row t * group + g is query t of the group's head g.
struct Rows {
  int64_t group, count;

  explicit Rows(const AttentionDecodeParams& params)
      : group(params.num_heads / params.num_kv_heads), count(params.num_queries * group) {}
  int64_t query(int64_t row) const { return row / group; }
  int64_t head(int64_t kv_head, int64_t row) const { return kv_head * group + row % group; }
};

// Scores stay as they leave the product until the exponent, which takes them to base 2; softcap scales them itself.
inline double score_scale(const AttentionDecodeParams& params) { return params.softcap > 0 ? 1 : params.softmax_scale; }

// The weighted sum of values [D] of a row, its maximal score and the sum of its weights.
template <typename A>
A* partial_of(const AttentionDecodeParams& params, int64_t sequence, int64_t kv_head, int64_t split, int64_t row) {
  const int64_t range = (sequence * params.num_kv_heads + kv_head) * params.max_splits + split;
  return static_cast<A*>(params.partial) + (range * Rows(params).count + row) * (params.head_dim + 2);
}

// Where the cache holds the keys and values of a sequence from position `key` on, run by run.
template <typename T>
void locate(const AttentionDecodeParams& params, const Range& range, int64_t key, int64_t num_keys, const T** keys,
            const T** values) {
  const HeadsView &k = params.k, &v = params.v;
  const int64_t table_row = range.sequence * params.table_stride;
  for (int64_t i = 0; i < num_keys;) {
    int64_t batch = range.sequence, row = key + i, run = num_keys - i;
    if (params.block_table != nullptr) {
      batch = params.block_table[table_row + row / params.page_size];
      row %= params.page_size;
      run = std::min(run, params.page_size - row);
    } else if (params.beam_slots != nullptr) {
      batch = params.beam_slots[table_row + row];
      run = 1;
    }
    const T* k_row =
        static_cast<const T*>(k.data) + batch * k.batch_stride + row * k.row_stride + range.kv_head * k.head_stride;
    const T* v_row =
        static_cast<const T*>(v.data) + batch * v.batch_stride + row * v.row_stride + range.kv_head * v.head_stride;
    for (const int64_t end = i + run; i < end; ++i, k_row += k.row_stride, v_row += v.row_stride) {
      keys[i] = k_row;
      values[i] = v_row;
    }
  }
}

template <typename T>
void decode_range(const AttentionDecodeParams& params, const Range& range) {
  using A = Acc<T>;
  const Rows rows(params);
  CachedAttention<T> attention(rows.count, params.head_dim, params.softmax_scale, params.softcap);
  for (int64_t row = 0; row < rows.count; ++row) {
    attention.set_query(row, static_cast<const T*>(params.q.data) + range.sequence * params.q.batch_stride +
                                 rows.query(row) * params.q.row_stride +
                                 rows.head(range.kv_head, row) * params.q.head_stride);
  }
  const int64_t oldest = params.seqlens[range.sequence] - params.num_queries;
  for (int64_t key = range.begin; key < range.end; key += kCachedTile) {
    const T *keys[kCachedTile], *values[kCachedTile];
    const int64_t num_keys = std::min(kCachedTile, range.end - key);
    locate(params, range, key, num_keys, keys, values);
    const auto last = [&](int64_t row) { return oldest + rows.query(row) - key; };
    const auto first = [&](int64_t row) { return params.window >= 0 ? last(row) - params.window : -key; };
    attention.visit(keys, values, num_keys, first, last);
  }
  for (int64_t row = 0; row < rows.count; ++row) {
    A* partial = partial_of<A>(params, range.sequence, range.kv_head, range.split, row);
    std::copy_n(attention.out(row), params.head_dim, partial);
    partial[params.head_dim] = attention.maximum(row);
    partial[params.head_dim + 1] = attention.sum(row);
  }
}

// Merges the ranges of one row with each other and with the sink, a key with value 0.
template <typename T>
void merge(const AttentionDecodeParams& params, int64_t sequence, int64_t kv_head, int64_t row, int64_t num_splits) {
  using A = Acc<T>;
  const Rows rows(params);
  const int64_t size = params.head_dim, head = rows.head(kv_head, row);
  const A exponent_scale = static_cast<A>(score_scale(params) * kLog2E);
  const auto partial = [&](int64_t split) { return partial_of<A>(params, sequence, kv_head, split, row); };
  A sink = -kInfinity<A>;
  if (params.sink != nullptr) sink = static_cast<A>(static_cast<const A*>(params.sink)[head] / score_scale(params));
  A maximum = sink;
  for (int64_t split = 0; split < num_splits; ++split) maximum = std::max(maximum, partial(split)[size]);
  const auto weight = [&](A score) {
    return score == -kInfinity<A> ? A{0} : std::exp2((score - maximum) * exponent_scale);
  };
  A sum = weight(sink);
  for (int64_t split = 0; split < num_splits; ++split) {
    A* statistics = partial(split) + size;
    statistics[0] = weight(statistics[0]);
    sum += statistics[0] * statistics[1];
  }
  const A inverse = sum == 0 ? 0 : 1 / sum;
  const int64_t out_row = (sequence * params.num_queries + rows.query(row)) * params.num_heads + head;
  for_each_vector<T>(size, [&](int64_t i, int count) {
    Vec<T> values{};
    for (int64_t split = 0; split < num_splits; ++split) {
      values += partial(split)[size] * load_lanes(partial(split) + i, count);
    }
    store_lanes(static_cast<T*>(params.out) + out_row * size + i, values * inverse, count);
  });
}

template <typename T>
void decode(const AttentionDecodeParams& params) {
  std::vector<Range> ranges;
  int64_t num_keys = 0;
  for (int64_t b = 0; b < params.batch; ++b) {
    const DecodeSplits splits(params.seqlens[b], params.num_queries, params.window, params.num_splits);
    for (int64_t split = 0; split < splits.count; ++split) {
      for (int64_t head = 0; head < params.num_kv_heads; ++head) {
        ranges.push_back({b, head, split, splits.begin(split), splits.end(split)});
        num_keys += ranges.back().end - ranges.back().begin;
      }
    }
  }
  const int64_t count = static_cast<int64_t>(ranges.size());
  run_tasks(count, 2 * params.head_dim * num_keys, [&](int64_t index) { decode_range<T>(params, ranges[index]); });

  const int64_t rows = Rows(params).count;
  parallel_for(
      params.batch * params.num_kv_heads, grain_for(4 * rows * params.head_dim), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t sequence = i / params.num_kv_heads, kv_head = i % params.num_kv_heads;
          const DecodeSplits splits(params.seqlens[sequence], params.num_queries, params.window, params.num_splits);
          for (int64_t row = 0; row < rows; ++row) merge<T>(params, sequence, kv_head, row, splits.count);
        }
      });
}

}  // namespace

void attention_decode(const AttentionDecodeParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) { decode<typename decltype(tag)::type>(params); });
}

}  // namespace arfast::ARFAST_CPU_TARGET
