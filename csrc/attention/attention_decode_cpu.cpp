// Attention of a few new queries to a long cache on the CPU: bound by memory, so keys and values are read once per
// group of query heads. A task is a range of keys of one key-value head; the partial softmaxes of the ranges are merged
// in their order (Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1).
#include <cmath>
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
        keys_(arena_.take(kDecodeTile * ld_)),
        values_(arena_.take(kDecodeTile * ld_)),
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
  // Where the cache holds key `position` of the sequence: at (batch or page, row).
  int64_t offset(const AttentionView& cache, int64_t position) const {
    int64_t batch = range_.sequence, row = position;
    if (params_.block_table != nullptr) {
      batch = params_.block_table[range_.sequence * params_.table_stride + position / params_.page_size];
      row = position % params_.page_size;
    } else if (params_.beam_slots != nullptr) {
      batch = params_.beam_slots[range_.sequence * params_.table_stride + position];
    }
    return batch * cache.batch_stride + row * cache.row_stride + range_.kv_head * cache.head_stride;
  }

  void visit_tile(int64_t key, int64_t num_keys) {
    const T *keys[kDecodeTile], *values[kDecodeTile];
    for (int64_t i = 0; i < num_keys; ++i) {
      keys[i] = static_cast<const T*>(params_.k.data) + offset(params_.k, key + i);
      values[i] = static_cast<const T*>(params_.v.data) + offset(params_.v, key + i);
    }
    pack_panels<T>(keys, num_keys, head_dim_, keys_);
    pack_rows<T>(values, num_keys, head_dim_, values_, ld_);
    const int64_t lanes = round_up_to_lanes<A>(num_keys);
    for (int64_t lane = 0; lane < lanes; lane += kPanel<A>) {
      multiply<A, Layout::kRowMajor>(scores_ + lane, kDecodeTile, queries_, ld_, keys_ + lane * head_dim_, kPanel<A>,
                                     rows_.count, std::min<int64_t>(kPanel<A>, lanes - lane), head_dim_, false);
    }
    for (int64_t row = 0; row < rows_.count; ++row) add_scores(row, key, num_keys);
    multiply<A, Layout::kRowMajor>(out_, ld_, scores_, kDecodeTile, values_, ld_, rows_.count, ld_, num_keys, true);
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
    const A factor = std::exp2((maximum_[row] - reference) * exponent_scale_);
    sum_[row] = sum_[row] * factor + reduce_add(sum);
    if (maximum > maximum_[row]) {
      A* out = out_ + row * ld_;
      for (int64_t i = 0; i < ld_; i += kL) store(out + i, load(out + i) * factor);
    }
    maximum_[row] = maximum;
  }

  const AttentionDecodeParams& params_;
  const Range range_;
  const Rows rows_;
  const int64_t seqlen_, head_dim_, ld_;
  const A exponent_scale_;
  Arena<A> arena_;
  A *queries_, *out_;  // [rows, ld]
  A* keys_;            // panels [kDecodeTile / kPanel][D][kPanel]
  A* values_;          // [kDecodeTile, ld]
  A* scores_;          // [rows, kDecodeTile]
  A *maximum_, *sum_;  // [rows]
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
  const int64_t mean_elements = count > 0 ? 2 * params.head_dim * num_keys / count : 0;
  run_tasks(count, grain_for(mean_elements), [&](int64_t index) { DecodeRange<T>(params, ranges[index]).run(); });

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
