// Attention of a few new queries to a long cache on the CPU: bound by memory, so keys and values are read once per
// group of query heads. A task is a range of keys of one key-value head; the partial softmaxes of the ranges are merged
// in their order (Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1).
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "attention/attention_decode.h"
#include "attention/attention_tile.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

constexpr double kLog2E = 1.4426950408889634;

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

// Two vectors interleaved, a0 b0 a1 b1 ...: the vector of their lower and that of their upper halves.
template <typename V, size_t... kLane>
inline V interleave_low(V a, V b, std::index_sequence<kLane...>) {
  return __builtin_shuffle(a, b, decltype(V{} < V{}){(kLane / 2 + kLane % 2 * sizeof...(kLane))...});
}
template <typename V, size_t... kLane>
inline V interleave_high(V a, V b, std::index_sequence<kLane...>) {
  constexpr size_t kL = sizeof...(kLane);
  return __builtin_shuffle(a, b, decltype(V{} < V{}){(kL / 2 + kLane / 2 + kLane % 2 * kL)...});
}

// The vector whose lane i is the sum over the lanes of rows[i]: the rounds of a transposition, added up.
template <typename V, size_t kCount>
inline V add_transposed(const V (&rows)[kCount]) {
  if constexpr (kCount == 1) {
    return rows[0];
  } else {
    constexpr std::make_index_sequence<sizeof(V) / sizeof(rows[0][0])> kLane;
    V next[kCount / 2];
#pragma GCC unroll 8
    for (size_t i = 0; i < kCount / 2; ++i) {
      const V a = rows[i], b = rows[i + kCount / 2];
      next[i] = interleave_low(a, b, kLane) + interleave_high(a, b, kLane);
    }
    return add_transposed(next);
  }
}

// Scores of kLanes pairs of a row and a key: their partial sums are added while they are transposed into one vector.
// size is a multiple of the lanes.
template <typename T, int kRows>
inline void multiply_keys(const Acc<T>* queries, int64_t ld, const T* const* keys, int64_t size, Acc<T>* scores) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>, kKeys = kL / kRows;
  V sum[kL] = {};
  int64_t i = 0;
  do {
    V key[kKeys];
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) key[k] = load(keys[k] + i);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const V query = load(queries + row * ld + i);
#pragma GCC unroll 16
      for (int k = 0; k < kKeys; ++k) sum[row * kKeys + k] += query * key[k];
    }
    i += kL;
  } while (i < size);
  Acc<T> products[kL];
  store(products, add_transposed(sum));
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
    std::memcpy(scores + row * kDecodeTile, products + row * kKeys, sizeof(V) / kRows);
}

// out [kRows, kVectors] += weights [kRows, num_keys] values [num_keys, kVectors], from a column on.
template <typename T, int kRows, int kVectors>
inline void multiply_values(const Acc<T>* weights, const T* const* values, int64_t num_keys, int64_t column,
                            Acc<T>* out, int64_t ld) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  V sum[kRows][kVectors] = {};
  for (int64_t key = 0; key < num_keys; ++key) {
    V value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = load(values[key] + column + v * kL);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[row][v] += weights[row * kDecodeTile + key] * value[v];
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Acc<T>* p = out + row * ld + column + v * kL;
      store(p, load(p) + sum[row][v]);
    }
  }
}

// Calls f(number of rows as a compile-time constant, first row) for blocks of at most 4 rows, and at most kLanes.
template <typename A, typename F>
inline void for_each_row_block(int64_t rows, const F& f) {
  int64_t row = 0;
  if constexpr (kLanes<A> >= 4) {
    for (; row + 4 <= rows; row += 4) f(std::integral_constant<int, 4>{}, row);
  }
  for (; row + 2 <= rows; row += 2) f(std::integral_constant<int, 2>{}, row);
  if (row < rows) f(std::integral_constant<int, 1>{}, row);
}

template <typename T>
class DecodeRange {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int kL = kLanes<A>;

  DecodeRange(const AttentionDecodeParams& params, const Range& range)
      : params_(params),
        range_(range),
        rows_(params),
        seqlen_(params.seqlens[range.sequence]),
        head_dim_(params.head_dim),
        ld_(round_up_to_lanes<A>(head_dim_)),
        exponent_scale_(static_cast<A>(score_scale(params) * kLog2E)),
        arena_(2 * Arena<A>::padded(rows_.count * ld_) + 2 * kDecodeTile * ld_ + rows_.count * kDecodeTile +
               2 * Arena<A>::padded(rows_.count)),
        queries_(arena_.take(rows_.count * ld_)),
        out_(arena_.take(rows_.count * ld_)),
        packed_keys_(arena_.take(kDecodeTile * ld_)),
        packed_values_(arena_.take(kDecodeTile * ld_)),
        scores_(arena_.take(rows_.count * kDecodeTile)),
        maximum_(arena_.take(rows_.count)),
        sum_(arena_.take(rows_.count)) {}

  void run() {
    for (int64_t row = 0; row < rows_.count; ++row) {
      const T* query = static_cast<const T*>(params_.q.data) + range_.sequence * params_.q.batch_stride +
                       rows_.query(row) * params_.q.row_stride +
                       rows_.head(range_.kv_head, row) * params_.q.head_stride;
      pack_rows<T>(&query, 1, head_dim_, queries_ + row * ld_, ld_);
    }
    std::fill_n(out_, rows_.count * ld_, A{0});
    std::fill_n(maximum_, rows_.count, -kInfinity<A>);
    std::fill_n(sum_, rows_.count, A{0});
    for (int64_t key = range_.begin; key < range_.end; key += kDecodeTile) {
      visit_tile(key, std::min(kDecodeTile, range_.end - key));
    }
    for (int64_t row = 0; row < rows_.count; ++row) {
      A* partial = partial_of<A>(params_, range_.sequence, range_.kv_head, range_.split, row);
      std::copy_n(out_ + row * ld_, head_dim_, partial);
      partial[head_dim_] = maximum_[row];
      partial[head_dim_ + 1] = sum_[row];
    }
  }

 private:
  // Where the cache holds the keys and values from position `key` on, run by run.
  void locate(int64_t key, int64_t num_keys, const T** keys, const T** values) const {
    const HeadsView &k = params_.k, &v = params_.v;
    const int64_t table_row = range_.sequence * params_.table_stride;
    for (int64_t i = 0; i < num_keys;) {
      int64_t batch = range_.sequence, row = key + i, run = num_keys - i;
      if (params_.block_table != nullptr) {
        batch = params_.block_table[table_row + row / params_.page_size];
        row %= params_.page_size;
        run = std::min(run, params_.page_size - row);
      } else if (params_.beam_slots != nullptr) {
        batch = params_.beam_slots[table_row + row];
        run = 1;
      }
      const T* k_row =
          static_cast<const T*>(k.data) + batch * k.batch_stride + row * k.row_stride + range_.kv_head * k.head_stride;
      const T* v_row =
          static_cast<const T*>(v.data) + batch * v.batch_stride + row * v.row_stride + range_.kv_head * v.head_stride;
      for (const int64_t end = i + run; i < end; ++i, k_row += k.row_stride, v_row += v.row_stride) {
        keys[i] = k_row;
        values[i] = v_row;
      }
    }
  }

  void visit_tile(int64_t key, int64_t num_keys) {
    const T *keys[kDecodeTile], *values[kDecodeTile];
    locate(key, num_keys, keys, values);
    // Scores come kLanes at a time: past the end the last key is repeated, and its scores are masked.
    std::fill(keys + num_keys, keys + kDecodeTile, keys[num_keys - 1]);
    if (head_dim_ == ld_) return visit_rows<T>(keys, values, key, num_keys);
    pack_rows<T>(keys, kDecodeTile, head_dim_, packed_keys_, ld_);
    pack_rows<T>(values, num_keys, head_dim_, packed_values_, ld_);
    const A *key_rows[kDecodeTile], *value_rows[kDecodeTile];
    for (int64_t i = 0; i < kDecodeTile; ++i) {
      key_rows[i] = packed_keys_ + i * ld_;
      value_rows[i] = packed_values_ + i * ld_;
    }
    visit_rows<A>(key_rows, value_rows, key, num_keys);
  }

  // U: the type of the rows, which are a multiple of the lanes long.
  template <typename U>
  void visit_rows(const U* const* keys, const U* const* values, int64_t key, int64_t num_keys) {
    for_each_row_block<A>(rows_.count, [&](auto count, int64_t row) {
      constexpr int kRows = count, kKeys = kL / kRows;
      for (int64_t i = 0; i < num_keys; i += kKeys) {
        multiply_keys<U, kRows>(queries_ + row * ld_, ld_, keys + i, ld_, scores_ + row * kDecodeTile + i);
      }
    });
    for (int64_t row = 0; row < rows_.count; ++row) add_scores(row, key, num_keys);
    for_each_row_block<A>(rows_.count, [&](auto count, int64_t row) {
      constexpr int kRows = count;
      int64_t column = 0;
      for (; column + 4 * kL <= ld_; column += 4 * kL) {
        multiply_values<U, kRows, 4>(scores_ + row * kDecodeTile, values, num_keys, column, out_ + row * ld_, ld_);
      }
      for (; column < ld_; column += kL) {
        multiply_values<U, kRows, 1>(scores_ + row * kDecodeTile, values, num_keys, column, out_ + row * ld_, ld_);
      }
    });
  }

  // Online softmax of one row: scores become weights relative to the new maximum.
  void add_scores(int64_t row, int64_t key, int64_t num_keys) {
    A* scores = scores_ + row * kDecodeTile;
    const int64_t position = seqlen_ - params_.num_queries + rows_.query(row);
    const int64_t last = std::min(position, key + num_keys - 1);
    const int64_t first = params_.window >= 0 ? position - params_.window : 0;
    const A softcap = static_cast<A>(params_.softcap);
    const A inside = static_cast<A>(params_.softcap > 0 ? params_.softmax_scale / params_.softcap : 0);
    V highest = splat<V>(maximum_[row]);
    for (int64_t i = 0; i < num_keys; i += kL) {
      V score = load(scores + i);
      if (softcap > 0) score = softcap * tanh(score * inside);
      if (key + i < first || key + i + kL - 1 > last) {
        score = lanes_between<A>(first - key - i, last - key - i) ? score : splat<V>(-kInfinity<A>);
      }
      store(scores + i, score);
      highest = max(score, highest);
    }
    const A maximum = reduce_max(highest);
    const A reference = maximum == -kInfinity<A> ? 0 : maximum;
    V sum{};
    for (int64_t i = 0; i < num_keys; i += kL) {
      const V weight = exp2_bounded((load(scores + i) - reference) * exponent_scale_);
      store(scores + i, weight);
      sum += weight;
    }
    if (maximum > maximum_[row]) {
      const A factor = std::exp2((maximum_[row] - maximum) * exponent_scale_);
      sum_[row] *= factor;
      A* out = out_ + row * ld_;
      for (int64_t i = 0; i < ld_; i += kL) store(out + i, load(out + i) * factor);
    }
    sum_[row] += reduce_add(sum);
    maximum_[row] = maximum;
  }

  const AttentionDecodeParams& params_;
  const Range range_;
  const Rows rows_;
  const int64_t seqlen_, head_dim_, ld_;
  const A exponent_scale_;
  Arena<A> arena_;
  A *queries_, *out_;                // [rows, ld]
  A *packed_keys_, *packed_values_;  // [kDecodeTile, ld]
  A* scores_;                        // [rows, kDecodeTile]
  A *maximum_, *sum_;                // [rows]
};

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
  run_tasks(count, 2 * params.head_dim * num_keys, [&](int64_t index) { DecodeRange<T>(params, ranges[index]).run(); });

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
