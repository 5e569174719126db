// The backward pass of attention on the CPU for one range of keys of one key-value head. Of bfloat16 on machines with
// matrix units (kAmx) all products are theirs, of probabilities and dscores that are rounded.
#pragma once

#include <cmath>
#include <utility>

#include "attention/attention_amx.h"
#include "attention/attention_layout.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

constexpr int64_t kQueryBlock = 128;
constexpr int64_t kKeyBlock = 64;
constexpr double kLog2E = 1.4426950408889634;

// One range of keys of one key-value head of one sequence.
struct KeyRange {
  int64_t sequence, kv_head, split, begin, end;
};

// The share of dq that the keys of one split contribute.
template <typename A>
A* dq_partial(const AttentionBackwardParams& params, int64_t split) {
  const AttentionProblem& problem = params.problem;
  const int64_t rows = problem.num_queries * (problem.cu_seqlens_q == nullptr ? problem.batch : 1);
  return static_cast<A*>(params.dq_partial) + split * rows * problem.num_heads * problem.head_dim;
}

template <typename T, bool kAmx>
class BackwardRange {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int kL = kLanes<A>;

  BackwardRange(const AttentionBackwardParams& params, const KeyRange& range)
      : params_(params),
        problem_(params.problem),
        range_(range),
        sequence_(problem_, range.sequence),
        visible_(problem_, sequence_.seqlen_q, sequence_.seqlen_k),
        head_dim_(problem_.head_dim),
        ld_(round_up_to_lanes<A>(head_dim_)),
        scale_(static_cast<A>(problem_.softmax_scale)),
        range_rows_(range.end - range.begin + (kAmx ? kTile : 0)),
        arena_(2 * Arena<A>::padded(range_rows_ * ld_) + 5 * kQueryBlock * ld_ + 2 * kKeyBlock * ld_ +
               4 * kKeyBlock * kQueryBlock + 3 * kQueryBlock),
        dk_(arena_.take(range_rows_ * ld_)),
        dv_(arena_.take(range_rows_ * ld_)),
        q_rows_(arena_.take(kQueryBlock * ld_)),
        q_panels_(arena_.take(kQueryBlock * ld_)),
        dout_rows_(arena_.take(kQueryBlock * ld_)),
        dout_panels_(arena_.take(kQueryBlock * ld_)),
        dq_(arena_.take(kQueryBlock * ld_)),
        keys_(arena_.take(kKeyBlock * ld_)),
        values_(arena_.take(kKeyBlock * ld_)),
        probabilities_(arena_.take(kKeyBlock * kQueryBlock)),
        dscores_(arena_.take(kKeyBlock * kQueryBlock)),
        rounded_(reinterpret_cast<BFloat16*>(arena_.take(kKeyBlock * kQueryBlock / 2))),
        rounded_dscores_(reinterpret_cast<BFloat16*>(arena_.take(kKeyBlock * kQueryBlock / 2))),
        dscore_pairs_(reinterpret_cast<uint32_t*>(arena_.take(kKeyBlock * kQueryBlock / 2))),
        lse_(arena_.take(kQueryBlock)),
        delta_(arena_.take(kQueryBlock)),
        dout_out_(arena_.take(kQueryBlock)) {}

  // Adds what the range contributes to dsink [H] to `dsink`, unless that is nullptr.
  void run(double* dsink) {
    [[maybe_unused]] const std::conditional_t<kAmx, TileShapes, int> shapes{};
    const int64_t group = problem_.num_heads / problem_.num_kv_heads;
    std::fill_n(dk_, range_rows_ * ld_, A{0});
    std::fill_n(dv_, range_rows_ * ld_, A{0});
    for (int64_t head = range_.kv_head * group; head < (range_.kv_head + 1) * group; ++head) {
      int64_t query = visible_.query_begin(sequence_.seqlen_q, sequence_.seqlen_k);
      for (; query < sequence_.seqlen_q; query += kQueryBlock) {
        const int64_t num_queries = std::min(kQueryBlock, sequence_.seqlen_q - query);
        visit_queries(head, query, num_queries);
        if (dsink != nullptr) dsink[head] -= sink_share(head, num_queries);
      }
    }
    for (int64_t key = range_.begin; key < range_.end; ++key) {
      const int64_t at = dense_index(problem_, sequence_.batch, sequence_.k_row + key, range_.kv_head,
                                     problem_.num_keys, problem_.num_kv_heads);
      store_row(static_cast<T*>(params_.dk) + at, dk_ + (key - range_.begin) * ld_, scale_);
      store_row(static_cast<T*>(params_.dv) + at, dv_ + (key - range_.begin) * ld_, 1);
    }
  }

 private:
  template <typename U>
  void store_row(U* target, const A* source, A scale) {
    for_each_vector<U>(head_dim_,
                       [&](int64_t i, int count) { store_lanes(target + i, load(source + i) * scale, count); });
  }

  void visit_queries(int64_t head, int64_t query, int64_t num_queries) {
    const int64_t begin = std::max(range_.begin, visible_.key_begin(query));
    const int64_t end = std::min(range_.end, visible_.key_end(query + num_queries - 1, sequence_.seqlen_k));
    std::fill_n(dq_, (kAmx ? kQueryBlock : num_queries) * ld_, A{0});
    std::fill_n(dout_out_, kQueryBlock, A{0});
    if (begin < end) load_queries(head, query, num_queries);
    for (int64_t key = begin; key < end; key += kKeyBlock) {
      visit_tile(query, num_queries, key, std::min(kKeyBlock, end - key));
    }
    const A* dq = dq_rows(num_queries);
    for (int64_t i = 0; i < num_queries; ++i) {
      const int64_t at = dense_index(problem_, sequence_.batch, sequence_.q_row + query + i, head, problem_.num_queries,
                                     problem_.num_heads);
      if (params_.dq_partial == nullptr) {
        store_row(static_cast<T*>(params_.dq) + at, dq + i * ld_, scale_);
      } else {
        store_row(dq_partial<A>(params_, range_.split) + at, dq + i * ld_, scale_);
      }
    }
  }

  // [kQueryBlock, ld]; kAmx: in the place of q_rows_.
  const A* dq_rows(int64_t num_queries) {
    if constexpr (!kAmx) return dq_;
    for (int64_t lane = 0; lane < num_queries; lane += kL) {
      for (int64_t column = 0; column < head_dim_; column += kL) {
        V square[kL];
        for (int i = 0; i < kL; ++i) square[i] = load(dq_ + (column + i) * kQueryBlock + lane);
        transpose(square);
        for (int i = 0; i < kL; ++i) store(q_rows_ + (lane + i) * ld_ + column, square[i]);
      }
    }
    return q_rows_;
  }

  // The sink is a key with probability exp(sink - lse) and value 0, hence dsink = -sum over the rows of p (dout . out).
  // The second factor is summed up here: from the rounded out it would be too coarse for a sum over so many rows.
  double sink_share(int64_t head, int64_t num_queries) const {
    const A sink = static_cast<const A*>(problem_.sink)[head];
    double sum = 0;
    for (int64_t i = 0; i < num_queries; ++i) sum += dout_out_[i] == 0 ? 0 : std::exp(sink - lse_[i]) * dout_out_[i];
    return sum;
  }

  void load_queries(int64_t head, int64_t query, int64_t num_queries) {
    const int64_t row = sequence_.q_row + query;
    const StridedRows<T> q = rows_of<T>(problem_.q, sequence_.batch, row, head);
    const StridedRows<T> dout = rows_of<T>(params_.dout, sequence_.batch, row, head);
    if constexpr (kAmx) {
      pack_row_pairs(q, num_queries, head_dim_, pairs(q_rows_), ld_);
      pack_row_pairs(dout, num_queries, head_dim_, pairs(dout_rows_), ld_);
      pack_pair_panels(q, num_queries, head_dim_, pairs(q_panels_));
      pack_pair_panels(dout, num_queries, head_dim_, pairs(dout_panels_));
    } else {
      pack_rows<T>(q, num_queries, head_dim_, q_rows_, ld_);
      pack_rows<T>(dout, num_queries, head_dim_, dout_rows_, ld_);
      pack_panels<T>(q, num_queries, head_dim_, q_panels_);
      pack_panels<T>(dout, num_queries, head_dim_, dout_panels_);
    }
    const int64_t at = statistic_index(problem_, sequence_.batch, row, head);
    for (int64_t i = 0; i < num_queries; ++i) {
      const A lse = static_cast<const A*>(params_.lse)[at + i];
      // +inf makes every probability of a row without any 0; -inf would make them NaN.
      lse_[i] = lse == -kInfinity<A> ? kInfinity<A> : lse;
    }
    std::fill(lse_ + num_queries, lse_ + kQueryBlock, A{0});
    const StridedRows<T> out = rows_of<T>(params_.out, sequence_.batch, row, head);
    if constexpr (kAmx) {
      std::fill_n(delta_, kQueryBlock, A{0});
      for (int64_t i = 0; i < num_queries; ++i) delta_[i] = dot(dout[i], out[i]);
    } else {
      compute_delta(out, num_queries);
    }
    const A* dlse = static_cast<const A*>(params_.dlse);
    for (int64_t i = 0; i < num_queries && dlse != nullptr; ++i) delta_[i] -= dlse[at + i];
  }

  A dot(const T* a, const T* b) const {
    V sum{};
    for (int64_t i = 0; i < head_dim_; i += kL) sum += load(a + i) * load(b + i);
    return reduce_add(sum);
  }

  // delta = rowsum(dout * out), summed in the order of dprobabilities: with few keys the two cancel almost entirely in
  // dscores, and so do their roundings.
  void compute_delta(const StridedRows<T>& out, int64_t num_queries) {
    for (int64_t lane = 0; lane < num_queries; lane += kL) {
      const A* dout = dout_panels_ + lane / kPanel<A> * kPanel<A> * head_dim_ + lane % kPanel<A>;
      V sum{}, chain{};
      for (int64_t column = 0; column < head_dim_; column += kL) {
        const int count = static_cast<int>(std::min<int64_t>(kL, head_dim_ - column));
        V square[kL] = {};
        for (int64_t i = 0; i < std::min<int64_t>(kL, num_queries - lane); ++i) {
          square[i] = load_lanes(out[lane + i] + column, count);
        }
        transpose(square);
        for (int i = 0; i < count; ++i) chain += load(dout + (column + i) * kPanel<A>) * square[i];
        if ((column + kL) % kChain != 0) continue;
        sum += chain;
        chain = V{};
      }
      store(delta_ + lane, sum + chain);
    }
  }

  void visit_tile(int64_t query, int64_t num_queries, int64_t key, int64_t num_keys) {
    const int64_t row = sequence_.k_row + key;
    const StridedRows<T> k = rows_of<T>(problem_.k, sequence_.batch, row, range_.kv_head);
    const StridedRows<T> v = rows_of<T>(problem_.v, sequence_.batch, row, range_.kv_head);
    if constexpr (kAmx) {
      copy_rows(k, num_keys, head_dim_, rounded(keys_), ld_);
      copy_transposed(k, num_keys, head_dim_, rounded(keys_) + kKeyBlock * ld_, kKeyBlock);
      copy_rows(v, num_keys, head_dim_, rounded(values_), ld_);
    } else {
      pack_rows<T>(k, num_keys, head_dim_, keys_, ld_);
      pack_rows<T>(v, num_keys, head_dim_, values_, ld_);
    }
    Band bands[kKeyBlock / kBandKeys];
    const int count = find_bands<A>(visible_, query, num_queries, key, num_keys, bands);
    for (const Band* band = bands; band != bands + count; ++band) {
      const int64_t rows = band->key_end - band->key_begin, first = band->key_begin * kQueryBlock + band->lane_begin;
      compute_products(keys_, q_panels_, *band, probabilities_);
      compute_products(values_, dout_panels_, *band, dscores_);
      compute_gradients(*band, query, key);
      // Lanes past the last query end here: they hold no row of q or dout.
      const int64_t lanes = std::min(band->lane_end, num_queries) - band->lane_begin;
      const int64_t target = (key - range_.begin + band->key_begin) * ld_, right = band->lane_begin * ld_;
      if constexpr (kAmx) {
        const int64_t tiles = round_up_to_tile(rows), width = band->lane_end - band->lane_begin;
        multiply_tiles(dv_ + target, ld_, rounded_ + first, kQueryBlock, pairs(dout_rows_) + right / 2, ld_, tiles, ld_,
                       width, true);
        multiply_tiles(dk_ + target, ld_, rounded_dscores_ + first, kQueryBlock, pairs(q_rows_) + right / 2, ld_, tiles,
                       ld_, width, true);
        multiply_tiles(dq_ + band->lane_begin, kQueryBlock, rounded(keys_) + kKeyBlock * ld_ + band->key_begin,
                       kKeyBlock, dscore_pairs_ + band->key_begin / 2 * kQueryBlock + band->lane_begin, kQueryBlock,
                       head_dim_, width, tiles, true);
        continue;
      }
      multiply<A, Layout::kRowMajor>(dv_ + target, ld_, probabilities_ + first, kQueryBlock, dout_rows_ + right, ld_,
                                     rows, ld_, lanes, true);
      multiply<A, Layout::kRowMajor>(dk_ + target, ld_, dscores_ + first, kQueryBlock, q_rows_ + right, ld_, rows, ld_,
                                     lanes, true);
      multiply<A, Layout::kColumnMajor>(dq_ + right, ld_, dscores_ + first, kQueryBlock, keys_ + band->key_begin * ld_,
                                        ld_, lanes, ld_, rows, true);
    }
  }

  // rows [keys of the band, D] times panels of queries -> product [kKeyBlock, kQueryBlock]
  void compute_products(A* rows, A* panels, const Band& band, A* product) {
    for (int64_t lane = band.lane_begin; lane < band.lane_end;) {
      const int64_t panel = lane / kPanel<A> * kPanel<A>, end = std::min(band.lane_end, panel + kPanel<A>);
      A* target = product + band.key_begin * kQueryBlock + lane;
      const int64_t num_keys = band.key_end - band.key_begin;
      if constexpr (kAmx) {
        multiply_tiles(target, kQueryBlock, rounded(rows) + band.key_begin * ld_, ld_,
                       pairs(panels) + panel * head_dim_ / 2 + lane - panel, kPanel<A>, round_up_to_tile(num_keys),
                       end - lane, head_dim_, false);
      } else {
        multiply<A, Layout::kRowMajor>(target, kQueryBlock, rows + band.key_begin * ld_, ld_,
                                       panels + panel * head_dim_ + lane - panel, kPanel<A>, num_keys, end - lane,
                                       head_dim_, false);
      }
      lane = end;
    }
  }

  // The packed operands of the matrix units lie where those of `multiply` would.
  static BFloat16* rounded(A* operand) { return reinterpret_cast<BFloat16*>(operand); }
  static uint32_t* pairs(A* operand) { return reinterpret_cast<uint32_t*>(operand); }

  // Scores become probabilities and dprobabilities become dscores = p * (dp - delta), in place; kAmx: rounded.
  void compute_gradients(const Band& band, int64_t query, int64_t key) {
    const bool capped = problem_.softcap > 0;
    const A softcap = static_cast<A>(problem_.softcap);
    const A inside = static_cast<A>(capped ? problem_.softmax_scale / problem_.softcap : 0);
    const A score_scale = capped ? 1 : scale_;
    const auto compute = [&](int64_t row, int64_t i) {
      V score = load(probabilities_ + row * kQueryBlock + i);
      const V bend = capped ? tanh(score * inside) : V{};
      if (capped) score = softcap * bend;
      V probability = exp2_bounded((score * score_scale - load(lse_ + i)) * static_cast<A>(kLog2E));
      const V dprobability = load(dscores_ + row * kQueryBlock + i);
      V dscore = probability * (dprobability - load(delta_ + i));
      if (capped) dscore *= 1 - bend * bend;
      if (band.masked) {
        const auto visible = visible_lanes<A>(visible_, query + i, key + row);
        probability = visible ? probability : V{};
        dscore = visible ? dscore : V{};
      }
      if (problem_.sink != nullptr) store(dout_out_ + i, load(dout_out_ + i) + probability * dprobability);
      return std::pair(probability, dscore);
    };
    if constexpr (kAmx) {
      const int64_t end = band.key_begin + round_up_to_tile(band.key_end - band.key_begin);
      for (int64_t row = band.key_begin; row < end; row += 2) {
        for (int64_t i = band.lane_begin; i < band.lane_end; i += kL) {
          const auto [p, ds] = row < band.key_end ? compute(row, i) : std::pair(V{}, V{});
          const auto [next_p, next_ds] = row + 1 < band.key_end ? compute(row + 1, i) : std::pair(V{}, V{});
          const int64_t at = row * kQueryBlock + i, next = at + kQueryBlock;
          store(rounded_ + at, p);
          store(rounded_ + next, next_p);
          store(rounded_dscores_ + at, ds);
          store(rounded_dscores_ + next, next_ds);
          store_pairs(dscore_pairs_ + row / 2 * kQueryBlock + i, ds, next_ds);
        }
      }
    } else {
      for (int64_t row = band.key_begin; row < band.key_end; ++row) {
        for (int64_t i = band.lane_begin; i < band.lane_end; i += kL) {
          const auto [probability, dscore] = compute(row, i);
          store(probabilities_ + row * kQueryBlock + i, probability);
          store(dscores_ + row * kQueryBlock + i, dscore);
        }
      }
    }
  }

  const AttentionBackwardParams& params_;
  const AttentionProblem& problem_;
  const KeyRange range_;
  const Sequence sequence_;
  const Visibility visible_;
  const int64_t head_dim_, ld_;
  const A scale_;
  const int64_t range_rows_;
  Arena<A> arena_;
  A *dk_, *dv_;  // [range_rows, ld]
  // [kQueryBlock, ld] and panels of it; kAmx: pairs along the queries, and along D, and dq [D, kQueryBlock]
  A *q_rows_, *q_panels_, *dout_rows_, *dout_panels_, *dq_;
  A *keys_, *values_;                     // [kKeyBlock, ld]; kAmx: bfloat16, and keys transposed behind keys
  A *probabilities_, *dscores_;           // [kKeyBlock, kQueryBlock]
  BFloat16 *rounded_, *rounded_dscores_;  // kAmx: the same
  uint32_t* dscore_pairs_;                // kAmx: [kKeyBlock / 2, kQueryBlock]
  A *lse_, *delta_, *dout_out_;           // [kQueryBlock]
};

}  // namespace
}  // namespace arfast::ARFAST_CPU_TARGET
