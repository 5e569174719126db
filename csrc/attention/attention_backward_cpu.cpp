// Attention on the CPU, backward: probabilities are recomputed tile by tile from lse (Dao et al. 2022, arXiv
// 2205.14135, algorithm 4). A task is one range of keys of one key-value head: it visits the queries of all heads of
// the group in a fixed order and owns dk and dv of its keys, so that the sums do not depend on the number of threads.
#include <cmath>
#include <vector>

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

template <typename T>
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
        arena_(2 * Arena<A>::padded((range.end - range.begin) * ld_) + 5 * kQueryBlock * ld_ + 2 * kKeyBlock * ld_ +
               2 * kKeyBlock * kQueryBlock + 3 * kQueryBlock),
        dk_(arena_.take((range.end - range.begin) * ld_)),
        dv_(arena_.take((range.end - range.begin) * ld_)),
        q_rows_(arena_.take(kQueryBlock * ld_)),
        q_panels_(arena_.take(kQueryBlock * ld_)),
        dout_rows_(arena_.take(kQueryBlock * ld_)),
        dout_panels_(arena_.take(kQueryBlock * ld_)),
        dq_(arena_.take(kQueryBlock * ld_)),
        keys_(arena_.take(kKeyBlock * ld_)),
        values_(arena_.take(kKeyBlock * ld_)),
        probabilities_(arena_.take(kKeyBlock * kQueryBlock)),
        dscores_(arena_.take(kKeyBlock * kQueryBlock)),
        lse_(arena_.take(kQueryBlock)),
        delta_(arena_.take(kQueryBlock)),
        dout_out_(arena_.take(kQueryBlock)) {}

  // Adds what the range contributes to dsink [H] to `dsink`, unless that is nullptr.
  void run(double* dsink) {
    const int64_t num_keys = range_.end - range_.begin, group = problem_.num_heads / problem_.num_kv_heads;
    std::fill_n(dk_, num_keys * ld_, A{0});
    std::fill_n(dv_, num_keys * ld_, A{0});
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
    std::fill_n(dq_, num_queries * ld_, A{0});
    std::fill_n(dout_out_, kQueryBlock, A{0});
    if (begin < end) load_queries(head, query, num_queries);
    for (int64_t key = begin; key < end; key += kKeyBlock) {
      visit_tile(query, num_queries, key, std::min(kKeyBlock, end - key));
    }
    for (int64_t i = 0; i < num_queries; ++i) {
      const int64_t at = dense_index(problem_, sequence_.batch, sequence_.q_row + query + i, head, problem_.num_queries,
                                     problem_.num_heads);
      if (params_.dq_partial == nullptr) {
        store_row(static_cast<T*>(params_.dq) + at, dq_ + i * ld_, scale_);
      } else {
        store_row(dq_partial<A>(params_, range_.split) + at, dq_ + i * ld_, scale_);
      }
    }
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
    pack_rows<T>(q, num_queries, head_dim_, q_rows_, ld_);
    pack_rows<T>(dout, num_queries, head_dim_, dout_rows_, ld_);
    pack_panels<T>(q, num_queries, head_dim_, q_panels_);
    pack_panels<T>(dout, num_queries, head_dim_, dout_panels_);
    const int64_t at = statistic_index(problem_, sequence_.batch, row, head);
    for (int64_t i = 0; i < num_queries; ++i) {
      const A lse = static_cast<const A*>(params_.lse)[at + i];
      // +inf makes every probability of a row without any 0; -inf would make them NaN.
      lse_[i] = lse == -kInfinity<A> ? kInfinity<A> : lse;
    }
    std::fill(lse_ + num_queries, lse_ + kQueryBlock, A{0});
    compute_delta(rows_of<T>(params_.out, sequence_.batch, row, head), num_queries);
    const A* dlse = static_cast<const A*>(params_.dlse);
    for (int64_t i = 0; i < num_queries && dlse != nullptr; ++i) delta_[i] -= dlse[at + i];
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
    pack_rows<T>(rows_of<T>(problem_.k, sequence_.batch, row, range_.kv_head), num_keys, head_dim_, keys_, ld_);
    pack_rows<T>(rows_of<T>(problem_.v, sequence_.batch, row, range_.kv_head), num_keys, head_dim_, values_, ld_);
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
      multiply<A, Layout::kRowMajor>(dv_ + target, ld_, probabilities_ + first, kQueryBlock, dout_rows_ + right, ld_,
                                     rows, ld_, lanes, true);
      multiply<A, Layout::kRowMajor>(dk_ + target, ld_, dscores_ + first, kQueryBlock, q_rows_ + right, ld_, rows, ld_,
                                     lanes, true);
      multiply<A, Layout::kColumnMajor>(dq_ + right, ld_, dscores_ + first, kQueryBlock, keys_ + band->key_begin * ld_,
                                        ld_, lanes, ld_, rows, true);
    }
  }

  // rows [keys of the band, D] times panels of queries -> product [kKeyBlock, kQueryBlock]
  void compute_products(const A* rows, const A* panels, const Band& band, A* product) {
    for (int64_t lane = band.lane_begin; lane < band.lane_end;) {
      const int64_t panel = lane / kPanel<A> * kPanel<A>, end = std::min(band.lane_end, panel + kPanel<A>);
      multiply<A, Layout::kRowMajor>(product + band.key_begin * kQueryBlock + lane, kQueryBlock,
                                     rows + band.key_begin * ld_, ld_, panels + panel * head_dim_ + lane - panel,
                                     kPanel<A>, band.key_end - band.key_begin, end - lane, head_dim_, false);
      lane = end;
    }
  }

  // Scores become probabilities and dprobabilities become dscores = p * (dp - delta), in place.
  void compute_gradients(const Band& band, int64_t query, int64_t key) {
    const bool capped = problem_.softcap > 0;
    const A softcap = static_cast<A>(problem_.softcap);
    const A inside = static_cast<A>(capped ? problem_.softmax_scale / problem_.softcap : 0);
    const A score_scale = capped ? 1 : scale_;
    for (int64_t row = band.key_begin; row < band.key_end; ++row) {
      for (int64_t i = band.lane_begin; i < band.lane_end; i += kL) {
        A* p = probabilities_ + row * kQueryBlock + i;
        A* ds = dscores_ + row * kQueryBlock + i;
        V score = load(p);
        const V bend = capped ? tanh(score * inside) : V{};
        if (capped) score = softcap * bend;
        V probability = exp2_bounded((score * score_scale - load(lse_ + i)) * static_cast<A>(kLog2E));
        const V dprobability = load(ds);
        V dscore = probability * (dprobability - load(delta_ + i));
        if (capped) dscore *= 1 - bend * bend;
        if (band.masked) {
          const auto visible = visible_lanes<A>(visible_, query + i, key + row);
          probability = visible ? probability : V{};
          dscore = visible ? dscore : V{};
        }
        if (problem_.sink != nullptr) store(dout_out_ + i, load(dout_out_ + i) + probability * dprobability);
        store(p, probability);
        store(ds, dscore);
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
  Arena<A> arena_;
  A *dk_, *dv_;                                              // [keys of the range, ld]
  A *q_rows_, *q_panels_, *dout_rows_, *dout_panels_, *dq_;  // [kQueryBlock, ld] and panels of it
  A *keys_, *values_;                                        // [kKeyBlock, ld]
  A *probabilities_, *dscores_;                              // [kKeyBlock, kQueryBlock]
  A *lse_, *delta_, *dout_out_;                              // [kQueryBlock]
};

// What dlse contributes to dsink: the sink's probability times dlse, summed over the rows.
template <typename A>
double dlse_share(const AttentionBackwardParams& params, int64_t head) {
  const AttentionProblem& problem = params.problem;
  const A sink = static_cast<const A*>(problem.sink)[head];
  double sum = 0;
  if (params.dlse == nullptr || sink == -kInfinity<A>) return sum;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const Sequence sequence(problem, b);
    const int64_t at = statistic_index(problem, sequence.batch, sequence.q_row, head);
    for (int64_t i = at; i < at + sequence.seqlen_q; ++i) {
      sum += std::exp(sink - static_cast<const A*>(params.lse)[i]) * static_cast<const A*>(params.dlse)[i];
    }
  }
  return sum;
}

// Zeros for the rows that no task writes.
template <typename T>
void fill_zeros(const AttentionProblem& problem, void* tensor, int64_t batch, int64_t begin, int64_t end, int64_t rows,
                int64_t heads) {
  T* first = static_cast<T*>(tensor) + dense_index(problem, batch, begin, 0, rows, heads);
  std::fill_n(first, (end - begin) * heads * problem.head_dim, T{});
}

template <typename T>
void sum_dq(const AttentionBackwardParams& params, const Sequence& sequence, int64_t row) {
  const AttentionProblem& problem = params.problem;
  const int64_t at = dense_index(problem, sequence.batch, row, 0, problem.num_queries, problem.num_heads);
  for_each_vector<T>(problem.num_heads * problem.head_dim, [&](int64_t i, int count) {
    Vec<T> sum{};
    for (int64_t split = 0; split < params.key_splits; ++split) {
      sum += load_lanes(dq_partial<Acc<T>>(params, split) + at + i, count);
    }
    store_lanes(static_cast<T*>(params.dq) + at + i, sum, count);
  });
}

template <typename T>
void backward(const AttentionBackwardParams& params) {
  const AttentionProblem& problem = params.problem;
  const int64_t splits = params.key_splits;
  std::vector<KeyRange> ranges;
  int64_t num_scores = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const Sequence sequence(problem, b);
    const int64_t size = ((sequence.seqlen_k + splits - 1) / splits + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    num_scores += sequence.seqlen_q * sequence.seqlen_k * problem.num_heads;
    for (int64_t split = 0; split < splits; ++split) {
      for (int64_t head = 0; head < problem.num_kv_heads; ++head) {
        ranges.push_back({b, head, split, std::min(split * size, sequence.seqlen_k),
                          std::min((split + 1) * size, sequence.seqlen_k)});
      }
    }
  }
  // Long sequences first: short tasks at the end keep all threads busy.
  std::stable_sort(ranges.begin(), ranges.end(), [&](const KeyRange& a, const KeyRange& b) {
    return Sequence(problem, a.sequence).seqlen_k > Sequence(problem, b.sequence).seqlen_k;
  });
  const int64_t num_heads = problem.num_heads, count = static_cast<int64_t>(ranges.size());
  std::vector<double> dsink(params.dsink != nullptr ? count * num_heads : 0);
  run_tasks(count, num_scores * problem.head_dim / kMultiplyAddsPerElement, [&](int64_t index) {
    BackwardRange<T>(params, ranges[index]).run(dsink.empty() ? nullptr : dsink.data() + index * num_heads);
  });

  for (int64_t b = 0; b < problem.batch; ++b) {
    const Sequence sequence(problem, b);
    const int64_t begin =
        Visibility(problem, sequence.seqlen_q, sequence.seqlen_k).query_begin(sequence.seqlen_q, sequence.seqlen_k);
    fill_zeros<T>(problem, params.dq, b, sequence.q_row, sequence.q_row + begin, problem.num_queries,
                  problem.num_heads);
    if (params.dq_partial == nullptr) continue;
    parallel_for(sequence.seqlen_q - begin, grain_for(problem.num_heads * problem.head_dim * splits),
                 [&](int64_t first, int64_t last) {
                   for (int64_t i = first; i < last; ++i) sum_dq<T>(params, sequence, sequence.q_row + begin + i);
                 });
  }
  if (problem.cu_seqlens_q != nullptr) {
    const int64_t q_end = problem.cu_seqlens_q[problem.batch], k_end = problem.cu_seqlens_k[problem.batch];
    fill_zeros<T>(problem, params.dq, 0, q_end, problem.num_queries, problem.num_queries, problem.num_heads);
    fill_zeros<T>(problem, params.dk, 0, k_end, problem.num_keys, problem.num_keys, problem.num_kv_heads);
    fill_zeros<T>(problem, params.dv, 0, k_end, problem.num_keys, problem.num_keys, problem.num_kv_heads);
  }
  for (int64_t head = 0; head < num_heads && params.dsink != nullptr; ++head) {
    double sum = dlse_share<Acc<T>>(params, head);
    for (int64_t index = 0; index < count; ++index) sum += dsink[index * num_heads + head];
    static_cast<Acc<T>*>(params.dsink)[head] = static_cast<Acc<T>>(sum);
  }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& params) {
  dispatch_dtype(params.problem.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(params); });
}

}  // namespace arfast::ARFAST_CPU_TARGET
