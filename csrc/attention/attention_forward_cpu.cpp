// Attention on the CPU, forward: online softmax over tiles of keys (Dao et al. 2022, arXiv 2205.14135, algorithm 1; the
// running statistics are those of Milakov and Gimelshein 2018, arXiv 1805.02867). A task is a block of queries of one
// head; tiles that the mask hides are never touched. Of bfloat16 on machines with matrix units (kAmx) both products are
// theirs, and the probabilities are rounded for the second; everything else happens in the same way.
#include <cmath>
#include <vector>

#include "attention/attention_amx.h"
#include "attention/attention_layout.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

constexpr int64_t kQueryBlock = 128;
constexpr int64_t kKeyBlock = 128;
constexpr double kLog2E = 1.4426950408889634;

template <typename T, bool kAmx>
class ForwardBlock {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int kL = kLanes<A>;

  explicit ForwardBlock(const AttentionForwardParams& params)
      : params_(params),
        problem_(params.problem),
        head_dim_(problem_.head_dim),
        ld_(round_up_to_lanes<A>(head_dim_)),
        // Scores stay as they leave the product until the exponent, which takes them to base 2; softcap scales them
        // itself.
        score_scale_(problem_.softcap > 0 ? 1 : problem_.softmax_scale),
        exponent_scale_(static_cast<A>(score_scale_ * kLog2E)),
        arena_(2 * Arena<A>::padded(kQueryBlock * ld_) + 2 * Arena<A>::padded(kKeyBlock * ld_) + 2 * kQueryBlock +
               2 * kKeyBlock * kPanel<A> + 4 * kPanel<A>),
        queries_(arena_.take(kQueryBlock * ld_)),
        keys_(arena_.take(kKeyBlock * ld_)),
        values_(arena_.take(kKeyBlock * ld_)),
        out_(arena_.take(kQueryBlock * ld_)),
        maximum_(arena_.take(kQueryBlock)),
        sum_(arena_.take(kQueryBlock)),
        scores_(arena_.take(kKeyBlock * kPanel<A>)),
        probabilities_(reinterpret_cast<uint32_t*>(arena_.take(kKeyBlock / 2 * kPanel<A>))),
        factor_(arena_.take(kPanel<A>)) {}

  // Queries [query, query + num_queries) of one head; every one of them sees at least one key.
  void run(const Sequence& sequence, int64_t head, int64_t query, int64_t num_queries) {
    [[maybe_unused]] const std::conditional_t<kAmx, TileShapes, int> shapes{};
    const Visibility visible(problem_, sequence.seqlen_q, sequence.seqlen_k);
    const int64_t kv_head = head / (problem_.num_heads / problem_.num_kv_heads);
    pack_queries(rows_of<T>(problem_.q, sequence.batch, sequence.q_row + query, head), num_queries);
    start(head, num_queries);
    const int64_t key_end = visible.key_end(query + num_queries - 1, sequence.seqlen_k);
    for (int64_t key = visible.key_begin(query); key < key_end; key += kKeyBlock) {
      const int64_t num_keys = std::min(kKeyBlock, key_end - key);
      const int64_t row = sequence.k_row + key;
      pack_keys(rows_of<T>(problem_.k, sequence.batch, row, kv_head), num_keys);
      pack_values(rows_of<T>(problem_.v, sequence.batch, row, kv_head), num_keys);
      for (int64_t lane = 0; lane < num_queries; lane += kPanel<A>) {
        const int64_t lanes = std::min<int64_t>(kPanel<A>, num_queries - lane);
        Band bands[kKeyBlock / kBandKeys];
        const int count = find_bands<A>(visible, query + lane, lanes, key, num_keys, bands);
        for (int i = 0; i < count; ++i) compute_scores(bands[i], visible, query, lane, key);
        update_maximum(bands, count, lane);
        for (int i = 0; i < count; ++i) add_values(bands[i], lane);
      }
    }
    finish(sequence, head, query, num_queries);
  }

 private:
  void pack_queries(const StridedRows<T>& rows, int64_t count) {
    if constexpr (kAmx) {
      pack_pair_panels(rows, count, head_dim_, reinterpret_cast<uint32_t*>(queries_));
    } else {
      pack_panels<T>(rows, count, head_dim_, queries_);
    }
  }

  void pack_keys(const StridedRows<T>& rows, int64_t count) {
    if constexpr (kAmx) {
      copy_rows(rows, count, head_dim_, reinterpret_cast<BFloat16*>(keys_), head_dim_);
    } else {
      pack_rows<T>(rows, count, head_dim_, keys_, ld_);
    }
  }

  void pack_values(const StridedRows<T>& rows, int64_t count) {
    if constexpr (kAmx) {
      copy_transposed(rows, count, head_dim_, reinterpret_cast<BFloat16*>(values_), kKeyBlock);
    } else {
      pack_rows<T>(rows, count, head_dim_, values_, ld_);
    }
  }

  // A sink is a key with value 0: the softmax starts with its logit as maximum and its own 1 as sum.
  void start(int64_t head, int64_t num_queries) {
    const bool sink = problem_.sink != nullptr;
    const A logit = sink ? static_cast<const A*>(problem_.sink)[head] : -kInfinity<A>;
    std::fill_n(maximum_, kQueryBlock, static_cast<A>(logit / score_scale_));
    std::fill_n(sum_, kQueryBlock, static_cast<A>(sink && logit > -kInfinity<A>));
    std::fill_n(out_, (num_queries + kPanel<A> - 1) / kPanel<A> * kPanel<A> * head_dim_, A{0});
  }

  void compute_scores(const Band& band, const Visibility& visible, int64_t query, int64_t lane, int64_t key) {
    A* scores = scores_ + band.key_begin * kPanel<A> + band.lane_begin;
    const int64_t num_keys = band.key_end - band.key_begin, num_lanes = band.lane_end - band.lane_begin;
    if constexpr (kAmx) {
      multiply_tiles(scores, kPanel<A>, reinterpret_cast<BFloat16*>(keys_) + band.key_begin * head_dim_, head_dim_,
                     reinterpret_cast<uint32_t*>(queries_) + lane * head_dim_ / 2 + band.lane_begin, kPanel<A>,
                     round_up_to_tile(num_keys), num_lanes, head_dim_, false);
    } else {
      multiply<A, Layout::kRowMajor>(scores, kPanel<A>, keys_ + band.key_begin * ld_, ld_,
                                     queries_ + lane * head_dim_ + band.lane_begin, kPanel<A>, num_keys, num_lanes,
                                     head_dim_, false);
    }
    const A softcap = static_cast<A>(problem_.softcap);
    const A inside = static_cast<A>(problem_.softcap > 0 ? problem_.softmax_scale / problem_.softcap : 0);
    if (!band.masked && softcap == 0) return;
    for (int64_t row = band.key_begin; row < band.key_end; ++row) {
      for (int64_t i = band.lane_begin; i < band.lane_end; i += kL) {
        A* p = scores_ + row * kPanel<A> + i;
        V score = load(p);
        if (softcap > 0) score = softcap * tanh(score * inside);
        if (band.masked) {
          score = visible_lanes<A>(visible, query + lane + i, key + row) ? score : splat<V>(-kInfinity<A>);
        }
        store(p, score);
      }
    }
  }

  // Raises the running maximum to the scores' and scales sum and output down accordingly.
  void update_maximum(const Band* bands, int count, int64_t lane) {
    bool changed = false;
    for (int64_t i = 0; i < kPanel<A>; i += kL) {
      const V before = load(maximum_ + lane + i);
      V after = before;
      for (const Band* band = bands; band != bands + count; ++band) {
        if (i < band->lane_begin || i >= band->lane_end) continue;
        for (int64_t row = band->key_begin; row < band->key_end; ++row) {
          after = max(load(scores_ + row * kPanel<A> + i), after);
        }
      }
      // A row that has seen nothing yet keeps -inf, whose difference to itself is no number.
      const V reference = after == -kInfinity<A> ? V{} : after;
      const V factor = exp2_bounded((before - reference) * exponent_scale_);
      store(maximum_ + lane + i, after);
      store(factor_ + i, factor);
      store(sum_ + lane + i, load(sum_ + lane + i) * factor);
      changed = changed || reduce_max(after == before ? V{} : splat<V>(1)) > 0;
    }
    if (!changed) return;
    A* out = out_ + lane * head_dim_;
    for (int64_t row = 0; row < head_dim_; ++row) {
      for (int64_t i = 0; i < kPanel<A>; i += kL) {
        store(out + row * kPanel<A> + i, load(out + row * kPanel<A> + i) * load(factor_ + i));
      }
    }
  }

  void add_values(const Band& band, int64_t lane) {
    const int64_t num_keys = band.key_end - band.key_begin, num_lanes = band.lane_end - band.lane_begin;
    A* out = out_ + lane * head_dim_ + band.lane_begin;
    uint32_t* pairs = probabilities_ + band.lane_begin;  // of this band alone
    for (int64_t i = band.lane_begin; i < band.lane_end; i += kL) {
      const V maximum = load(maximum_ + lane + i);
      const V reference = maximum == -kInfinity<A> ? V{} : maximum;
      V sum{};
      const auto probability = [&](int64_t row) {
        return exp2_bounded((load(scores_ + row * kPanel<A> + i) - reference) * exponent_scale_);
      };
      if constexpr (kAmx) {
        for (int64_t row = 0; row < round_up_to_tile(num_keys); row += 2) {
          const V first = row < num_keys ? probability(band.key_begin + row) : V{};
          const V second = row + 1 < num_keys ? probability(band.key_begin + row + 1) : V{};
          sum += first + second;
          store_pairs(pairs + row / 2 * kPanel<A> + i - band.lane_begin, first, second);
        }
      } else {
        for (int64_t row = band.key_begin; row < band.key_end; ++row) {
          const V one = probability(row);
          sum += one;
          store(scores_ + row * kPanel<A> + i, one);
        }
      }
      store(sum_ + lane + i, load(sum_ + lane + i) + sum);
    }
    if constexpr (kAmx) {
      multiply_tiles(out, kPanel<A>, reinterpret_cast<BFloat16*>(values_) + band.key_begin, kKeyBlock, pairs, kPanel<A>,
                     head_dim_, num_lanes, round_up_to_tile(num_keys), true);
    } else {
      multiply<A, Layout::kColumnMajor>(out, kPanel<A>, values_ + band.key_begin * ld_, ld_,
                                        scores_ + band.key_begin * kPanel<A> + band.lane_begin, kPanel<A>, head_dim_,
                                        num_lanes, num_keys, true);
    }
  }

  void finish(const Sequence& sequence, int64_t head, int64_t query, int64_t num_queries) {
    A* lse = static_cast<A*>(params_.lse);
    for (int64_t i = 0; i < num_queries; ++i) {
      const int64_t at = statistic_index(problem_, sequence.batch, sequence.q_row + query + i, head);
      lse[at] = static_cast<A>(maximum_[i] * score_scale_ + std::log(static_cast<double>(sum_[i])));
    }
    for (int64_t lane = 0; lane < num_queries; lane += kL) {
      const V sum = load(sum_ + lane);
      const V inverse = sum == 0 ? V{} : 1 / sum;
      const A* panel = out_ + lane / kPanel<A> * kPanel<A> * head_dim_ + lane % kPanel<A>;
      for (int64_t column = 0; column < head_dim_; column += kL) {
        const int count = static_cast<int>(std::min<int64_t>(kL, head_dim_ - column));
        V square[kL];
        for (int i = 0; i < kL; ++i) square[i] = i < count ? load(panel + (column + i) * kPanel<A>) * inverse : V{};
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(kL, num_queries - lane); ++i) {
          const int64_t row = sequence.q_row + query + lane + i;
          T* out = static_cast<T*>(params_.out) +
                   dense_index(problem_, sequence.batch, row, head, problem_.num_queries, problem_.num_heads);
          store_lanes(out + column, square[i], count);
        }
      }
    }
  }

  const AttentionForwardParams& params_;
  const AttentionProblem& problem_;
  const int64_t head_dim_, ld_;
  const double score_scale_;
  const A exponent_scale_;
  Arena<A> arena_;
  A* queries_;               // panels [kQueryBlock / kPanel][D][kPanel]; kAmx: pairs, [D / 2]
  A *keys_, *values_;        // [kKeyBlock, ld]; kAmx: bfloat16 [kKeyBlock, D] and [D, kKeyBlock]
  A* out_;                   // panels like queries_, [D]
  A *maximum_, *sum_;        // [kQueryBlock]
  A* scores_;                // [kKeyBlock, kPanel]
  uint32_t* probabilities_;  // kAmx: pairs [kKeyBlock / 2, kPanel]
  A* factor_;                // [kPanel]
};

// out 0 and lse of nothing (the sink's logit, where there is one) for rows that see no key.
template <typename T>
void fill_empty_rows(const AttentionForwardParams& params, int64_t batch, int64_t begin, int64_t end, bool sink) {
  const AttentionProblem& problem = params.problem;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = dense_index(problem, batch, row, 0, problem.num_queries, problem.num_heads);
    std::fill_n(static_cast<T*>(params.out) + first, problem.num_heads * problem.head_dim, T{});
    for (int64_t head = 0; head < problem.num_heads; ++head) {
      static_cast<Acc<T>*>(params.lse)[statistic_index(problem, batch, row, head)] =
          sink ? static_cast<const Acc<T>*>(problem.sink)[head] : -kInfinity<Acc<T>>;
    }
  }
}

template <typename T, bool kAmx>
void forward(const AttentionForwardParams& params) {
  const AttentionProblem& problem = params.problem;
  struct Work {
    int32_t sequence, head;
    int64_t query;
  };
  std::vector<Work> work;
  int64_t num_scores = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const Sequence sequence(problem, b);
    const Visibility visible(problem, sequence.seqlen_q, sequence.seqlen_k);
    const int64_t begin = visible.query_begin(sequence.seqlen_q, sequence.seqlen_k);
    fill_empty_rows<T>(params, b, sequence.q_row, sequence.q_row + begin, problem.sink != nullptr);
    num_scores += (sequence.seqlen_q - begin) * sequence.seqlen_k * problem.num_heads;
    // Last queries first: they see the most keys, and short tasks at the end keep all threads busy.
    const int64_t blocks = (sequence.seqlen_q - begin + kQueryBlock - 1) / kQueryBlock;
    for (int64_t block = blocks - 1; block >= 0; --block) {
      for (int64_t head = 0; head < problem.num_heads; ++head) {
        work.push_back({static_cast<int32_t>(b), static_cast<int32_t>(head), begin + block * kQueryBlock});
      }
    }
  }
  if (problem.cu_seqlens_q != nullptr) {
    fill_empty_rows<T>(params, 0, problem.cu_seqlens_q[problem.batch], problem.num_queries, false);
  }
  run_tasks(static_cast<int64_t>(work.size()), num_scores * problem.head_dim / kMultiplyAddsPerElement,
            [&](int64_t index) {
              const Work& task = work[index];
              const Sequence sequence(problem, task.sequence);
              ForwardBlock<T, kAmx>(params).run(sequence, task.head, task.query,
                                                std::min(kQueryBlock, sequence.seqlen_q - task.query));
            });
}

}  // namespace

void attention_forward(const AttentionForwardParams& params) {
  dispatch(params.problem, [&](auto element, auto amx) { forward<typename decltype(element)::type, amx>(params); });
}

}  // namespace arfast::ARFAST_CPU_TARGET
