// Top-k routing of tokens to experts on the CPU (Shazeer et al. 2017, arXiv 1701.06538, section 2.1; groups and bias:
// DeepSeek-V3, arXiv 2412.19437, equations 12 to 16). A tile holds one token per vector lane, so the selection needs no
// horizontal step; a counting sort over blocks of tokens then orders the choices by expert.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/buffer.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/transpose.h"
#include "moe_routing/moe_routing.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

template <typename A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

// NaN and -inf count as the lowest finite number: -inf is what marks a candidate as taken or masked, so there are
// always enough candidates left and the ids are unique whatever the logits are.
template <typename T>
inline Vec<T> floored(Vec<T> v) {
  const Vec<T> lowest = splat<Vec<T>>(kLowest<Acc<T>>);
  return v > lowest ? v : lowest;
}

template <typename T>
inline Vec<T> sigmoid(Vec<T> v) {
  return 1 / (1 + exp(-v));
}

// Working memory of one tile of kLanes<T> tokens; every row is one vector.
template <typename T>
struct Tile {
  explicit Tile(const MoeRouteParams& params)
      : logits(params.num_experts * kLanes<T>),
        choice(params.num_experts * kLanes<T>),
        groups(params.num_groups * kLanes<T>),
        weights(params.top_k * kLanes<T>) {}
  Buffer<Acc<T>> logits, choice, groups, weights;
};

// One row per expert, one lane per token; lanes past `count` repeat the last token.
template <typename T>
void load_logits(const MoeRouteParams& params, int64_t begin, int count, Tile<T>& tile) {
  const T* logits = static_cast<const T*>(params.router_logits) + begin * params.logits_stride;
  const auto row = [&](int lane) { return logits + std::min(lane, count - 1) * params.logits_stride; };
  int64_t e = 0;
  for (; e + kLanes<T> <= params.num_experts; e += kLanes<T>) {
    Vec<T> square[kLanes<T>];
    for (int lane = 0; lane < kLanes<T>; ++lane) square[lane] = load(row(lane) + e);
    transpose(square);
    for (int i = 0; i < kLanes<T>; ++i) store(tile.logits.data() + (e + i) * kLanes<T>, square[i]);
  }
  for (; e < params.num_experts; ++e) {
    for (int lane = 0; lane < kLanes<T>; ++lane) tile.logits[e * kLanes<T> + lane] = to_acc(row(lane)[e]);
  }
}

// The largest of n candidates per lane and its index, the lowest one among equals. Four strands, since each step of one
// waits for its compare before.
template <typename T>
auto largest(const Acc<T>* values, int64_t n) {
  using V = Vec<T>;
  using Index = decltype(V{} > V{});
  using Lane = decltype(Index{}[0] + 0);
  constexpr int kStrands = 4;
  const int64_t length = n / kStrands;
  V best[kStrands];
  Index index[kStrands]{}, now{};
  for (V& v : best) v = splat<V>(-kInfinity<Acc<T>>);
  for (int64_t i = 0; i < length; ++i, now += 1) {
    for (int strand = 0; strand < kStrands; ++strand) {
      const V v = load(values + (strand * length + i) * kLanes<T>);
      const Index better = v > best[strand];
      best[strand] = better ? v : best[strand];
      index[strand] = better ? now : index[strand];
    }
  }
  const auto challenge = [&](V v, Index i) {
    const Index better = v > best[0];
    best[0] = better ? v : best[0];
    index[0] = better ? i : index[0];
  };
  for (int strand = 1; strand < kStrands; ++strand) {
    challenge(best[strand], index[strand] + static_cast<Lane>(strand * length));
  }
  for (int64_t i = kStrands * length; i < n; ++i) {
    challenge(load(values + i * kLanes<T>), Index{} + static_cast<Lane>(i));
  }
  return index[0];
}

// Takes the k largest of n candidates per lane out of `values`, largest first, by overwriting them with -inf, and calls
// f(rank, lane, index).
template <typename T, typename F>
void select_top(Acc<T>* values, int64_t n, int64_t k, const F& f) {
  for (int64_t rank = 0; rank < k; ++rank) {
    const auto index = largest<T>(values, n);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      values[index[lane] * kLanes<T> + lane] = -kInfinity<Acc<T>>;
      f(rank, lane, static_cast<int64_t>(index[lane]));
    }
  }
}

// Of one row per lane: softmax is exp(logit - shift) / sum. Through lse it would lose the digits that lse has before
// the point.
template <typename T>
struct RowStatistics {
  Vec<T> shift, sum, lse;
};

template <typename T>
RowStatistics<T> row_statistics(const Acc<T>* logits, int64_t num_experts) {
  using V = Vec<T>;
  V top = splat<V>(-kInfinity<Acc<T>>), sum{};
  for (int64_t e = 0; e < num_experts; ++e) top = max(load(logits + e * kLanes<T>), top);
  const V shift = top - top == 0 ? top : V{};                  // an infinite one would make inf - inf
  for (int64_t begin = 0; begin < num_experts; begin += 16) {  // one long chain of additions would round too often
    V part{};
    for (int64_t e = begin; e < std::min(begin + 16, num_experts); ++e) {
      part += exp(load(logits + e * kLanes<T>) - shift);
    }
    sum += part;
  }
  V lse = shift;
  for (int lane = 0; lane < kLanes<T>; ++lane) lse[lane] += std::log(sum[lane]);
  return {shift, sum, lse};
}

// Leaves the best `top_groups` groups in tile.choice and masks the others. A group is ranked by its best score for
// softmax (DeepSeek-V2), by the sum of its two best for sigmoid (DeepSeek-V3).
template <typename T>
void limit_groups(const MoeRouteParams& params, Tile<T>& tile) {
  using V = Vec<T>;
  const int64_t size = params.num_experts / params.num_groups;
  for (int64_t group = 0; group < params.num_groups; ++group) {
    const Acc<T>* members = tile.choice.data() + group * size * kLanes<T>;
    V best = load(members), second = splat<V>(-kInfinity<Acc<T>>);
    for (int64_t i = 1; i < size; ++i) {
      const V v = load(members + i * kLanes<T>);
      second = max(second, v < best ? v : best);
      best = max(best, v);
    }
    const V score = params.sigmoid && size > 1 ? best + second : best;
    store(tile.groups.data() + group * kLanes<T>, floored<T>(score));
  }
  select_top<T>(tile.groups.data(), params.num_groups, params.top_groups, [](int64_t, int, int64_t) {});
  const V masked = splat<V>(-kInfinity<Acc<T>>);
  for (int64_t e = 0; e < params.num_experts; ++e) {
    const V taken = load(tile.groups.data() + e / size * kLanes<T>);
    Acc<T>* choice = tile.choice.data() + e * kLanes<T>;
    store(choice, taken == masked ? load(choice) : masked);
  }
}

// What the experts compete with. Scores rise with the logits, so where nothing is added to them the logits themselves
// decide: the order is then exact.
template <typename T>
void fill_choice(const MoeRouteParams& params, const RowStatistics<T>& row, Tile<T>& tile) {
  const auto* bias = reinterpret_cast<const Acc<T>*>(params.bias);
  const bool by_logit = bias == nullptr && (!params.sigmoid || params.num_groups == 1);
  for (int64_t e = 0; e < params.num_experts; ++e) {
    Vec<T> v = load(tile.logits.data() + e * kLanes<T>);
    if (!by_logit) v = params.sigmoid ? sigmoid<T>(v) : exp(v - row.shift) / row.sum;
    if (bias != nullptr) v += bias[e];
    store(tile.choice.data() + e * kLanes<T>, floored<T>(v));
  }
  if (params.num_groups > 1) limit_groups(params, tile);
}

// tile.weights: the logits of the chosen experts on entry, their weights on return.
template <typename T>
void weigh(const MoeRouteParams& params, const RowStatistics<T>& row, Tile<T>& tile) {
  using V = Vec<T>;
  V shift = row.shift, sum{};
  if (params.renormalize) {  // softmax over the chosen: the same quotient without underflow
    shift = splat<V>(-kInfinity<Acc<T>>);
    for (int64_t j = 0; j < params.top_k; ++j) shift = max(load(tile.weights.data() + j * kLanes<T>), shift);
  }
  for (int64_t j = 0; j < params.top_k; ++j) {
    Acc<T>* weight = tile.weights.data() + j * kLanes<T>;
    const V score = params.sigmoid ? sigmoid<T>(load(weight)) : exp(load(weight) - shift);
    sum += score;
    store(weight, score);
  }
  V factor = splat<V>(static_cast<Acc<T>>(params.scale));
  if (params.renormalize) {
    factor /= params.sigmoid ? sum + static_cast<Acc<T>>(kSigmoidEps) : sum;
  } else if (!params.sigmoid) {
    factor /= row.sum;
  }
  // A NaN anywhere in a row must show, although it lost the competition.
  const V nan = splat<V>(std::numeric_limits<Acc<T>>::quiet_NaN());
  factor = row.lse == row.lse ? factor : nan;
  if (!params.sigmoid) factor = row.lse - row.lse == 0 ? factor : nan;
  for (int64_t j = 0; j < params.top_k; ++j) {
    Acc<T>* weight = tile.weights.data() + j * kLanes<T>;
    store(weight, load(weight) * factor);
  }
}

// Tokens [begin, begin + count), count <= kLanes<T>: ids, weights and lse.
template <typename T>
void route_tile(const MoeRouteParams& params, int64_t begin, int count, Tile<T>& tile) {
  load_logits(params, begin, count, tile);
  const RowStatistics<T> row = row_statistics<T>(tile.logits.data(), params.num_experts);
  fill_choice(params, row, tile);
  int32_t* ids = params.expert_ids + begin * params.top_k;
  select_top<T>(tile.choice.data(), params.num_experts, params.top_k, [&](int64_t rank, int lane, int64_t index) {
    tile.weights[rank * kLanes<T> + lane] = tile.logits[index * kLanes<T> + lane];
    if (lane < count) ids[lane * params.top_k + rank] = static_cast<int32_t>(index);
  });
  weigh(params, row, tile);
  Acc<T>* weights = reinterpret_cast<Acc<T>*>(params.expert_weights) + begin * params.top_k;
  for (int lane = 0; lane < count; ++lane) {
    for (int64_t j = 0; j < params.top_k; ++j) weights[lane * params.top_k + j] = tile.weights[j * kLanes<T> + lane];
    reinterpret_cast<Acc<T>*>(params.lse)[begin + lane] = row.lse[lane];
  }
}

// Turns the histograms into where each block's rows of each expert begin.
void scan_histograms(const MoeRouteParams& params) {
  const int64_t num_blocks = (params.num_tokens + kMoeRouteBlock - 1) / kMoeRouteBlock;
  int32_t row = 0;
  for (int64_t e = 0; e < params.num_experts; ++e) {
    params.offsets[e] = row;
    for (int64_t block = 0; block < num_blocks; ++block) {
      int32_t& entry = params.histograms[block * params.num_experts + e];
      const int32_t count = entry;
      entry = row;
      row += count;
    }
    params.tokens_per_expert[e] = row - params.offsets[e];
  }
  params.offsets[params.num_experts] = row;
}

// In the closed form of moe_routing.h.
template <typename T>
void backward_row(const MoeRouteBackwardParams& params, int64_t row) {
  using A = Acc<T>;
  const T* logits = static_cast<const T*>(params.router_logits) + row * params.logits_stride;
  T* dlogits = static_cast<T*>(params.drouter_logits) + row * params.num_experts;
  const int32_t* ids = params.expert_ids + row * params.top_k;
  const A* weights = reinterpret_cast<const A*>(params.expert_weights) + row * params.top_k;
  const auto* all_dweights = reinterpret_cast<const A*>(params.dexpert_weights);
  const A* dweights = all_dweights == nullptr ? nullptr : all_dweights + row * params.top_k;
  const A lse = reinterpret_cast<const A*>(params.lse)[row];
  const A scale = static_cast<A>(params.scale);

  A dot = 0, sum = static_cast<A>(kSigmoidEps);
  for (int64_t j = 0; j < params.top_k && dweights != nullptr; ++j) {
    dot += weights[j] * dweights[j];
    if (params.sigmoid) sum += 1 / (1 + std::exp(-to_acc(logits[ids[j]])));
  }
  const bool dense = params.dlse != nullptr || !(params.sigmoid || params.renormalize);
  A coefficient = params.dlse == nullptr ? 0 : reinterpret_cast<const A*>(params.dlse)[row];
  if (!params.sigmoid && !params.renormalize) coefficient -= dot;
  for_each_vector<T>(params.num_experts, [&](int64_t i, int count) {
    const Vec<T> gradient = dense ? coefficient * exp(load_lanes(logits + i, count) - lse) : Vec<T>{};
    store_lanes(dlogits + i, gradient, count);
  });
  for (int64_t j = 0; j < params.top_k && dweights != nullptr; ++j) {
    const A logit = to_acc(logits[ids[j]]);
    A gradient = weights[j] * (params.renormalize ? dweights[j] - dot / scale : dweights[j]);
    if (params.sigmoid) {
      const A score = 1 / (1 + std::exp(-logit));
      gradient = score * (1 - score) * (params.renormalize ? (scale * dweights[j] - dot) / sum : scale * dweights[j]);
    }
    // From the float value: adding to the stored element would round twice.
    if (dense) gradient += coefficient * std::exp(logit - lse);
    dlogits[ids[j]] = from_acc<T>(gradient);
  }
}

}  // namespace

void moe_route_forward(const MoeRouteParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_blocks(params.num_tokens, kMoeRouteBlock, [&](int64_t block, int64_t begin, int64_t end) {
      Tile<T> tile(params);
      for (int64_t t = begin; t < end; t += kLanes<T>) {
        route_tile<T>(params, t, static_cast<int>(std::min<int64_t>(kLanes<T>, end - t)), tile);
      }
      int32_t* histogram = params.histograms + block * params.num_experts;
      std::fill_n(histogram, params.num_experts, 0);
      for (int64_t i = begin * params.top_k; i < end * params.top_k; ++i) ++histogram[params.expert_ids[i]];
    });
  });
  scan_histograms(params);
  parallel_blocks(params.num_tokens, kMoeRouteBlock, [&](int64_t block, int64_t begin, int64_t end) {
    int32_t* next_row = params.histograms + block * params.num_experts;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = t * params.top_k; i < (t + 1) * params.top_k; ++i) {
        const int32_t row = next_row[params.expert_ids[i]]++;
        params.position[i] = row;
        params.source_token[row] = static_cast<int32_t>(t);
      }
    }
  });
}

void moe_route_backward(const MoeRouteBackwardParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(params.num_tokens, grain_for(params.num_experts), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) backward_row<T>(params, row);
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
