// Attention on the CPU, backward: probabilities are recomputed tile by tile from lse (Dao et al. 2022, arXiv
// 2205.14135, algorithm 4). A task is one range of keys of one key-value head: it visits the queries of all heads of
// the group in a fixed order and owns dk and dv of its keys, so that the sums do not depend on the number of threads.
#include <cmath>
#include <vector>

#include "attention/attention_backward_range.h"
#include "core/buffer.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

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

template <typename T, bool kAmx>
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
  const bool sink = params.dsink != nullptr;
  const Buffer<double> dsink(sink ? count * num_heads : 0);
  std::fill_n(dsink.data(), sink ? count * num_heads : 0, 0.0);
  run_tasks(count, num_scores * problem.head_dim / kMultiplyAddsPerElement, [&](int64_t index) {
    BackwardRange<T, kAmx>(params, ranges[index]).run(sink ? dsink.data() + index * num_heads : nullptr);
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
  for (int64_t head = 0; sink && head < num_heads; ++head) {
    double sum = dlse_share<Acc<T>>(params, head);
    for (int64_t index = 0; index < count; ++index) sum += dsink[index * num_heads + head];
    static_cast<Acc<T>*>(params.dsink)[head] = static_cast<Acc<T>>(sum);
  }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& params) {
  dispatch(params.problem, [&](auto element, auto amx) { backward<typename decltype(element)::type, amx>(params); });
}

}  // namespace arfast::ARFAST_CPU_TARGET
