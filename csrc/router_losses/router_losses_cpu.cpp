// The auxiliary losses of a router on the CPU: blocks of tokens, whose sums are added in order.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/parallel.h"
#include "core/simd.h"
#include "router_losses/router_losses.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// Lanes beyond the row have no probability.
template <typename T>
Vec<T> load_logits(const T* p, int count) {
  return count == kLanes<T> ? load(p) : load_partial(p, count, -std::numeric_limits<Acc<T>>::infinity());
}

template <typename A>
struct LogSumExp {
  A max;
  A sum;  // of exp(logit - max)
  A value() const { return std::isfinite(max) ? max + std::log(sum) : max; }
};

template <typename T>
LogSumExp<Acc<T>> log_sum_exp(const T* logits, int64_t size) {
  Vec<T> maxima = splat<Vec<T>>(-std::numeric_limits<Acc<T>>::infinity()), nan{};
  for_each_vector<T>(size, [&](int64_t i, int count) {
    const Vec<T> x = load_logits(logits + i, count);
    maxima = max(x, maxima);
    nan = x != x ? x : nan;
  });
  const Acc<T> sum_of_nan = reduce_add(nan), largest = sum_of_nan == 0 ? reduce_max(maxima) : sum_of_nan;
  Vec<T> sums{};
  for_each_vector<T>(size, [&](int64_t i, int count) { sums += exp(load_logits(logits + i, count) - largest); });
  return {largest, reduce_add(sums)};
}

// What a block of tokens adds to the sums.
template <typename A>
struct BlockSums {
  std::vector<A> probabilities;  // [E]
  std::vector<int32_t> choices;  // [E]
  A squares = 0;
  int32_t num_counted = 0;
};

template <typename T>
void add_token(const RouterLossesForwardParams& params, int64_t token, BlockSums<Acc<T>>& sums) {
  const T* logits = static_cast<const T*>(params.router_logits) + token * params.logits_stride;
  const LogSumExp<Acc<T>> lse = log_sum_exp(logits, params.num_experts);
  reinterpret_cast<Acc<T>*>(params.lse)[token] = lse.value();
  sums.squares += lse.value() * lse.value();
  ++sums.num_counted;
  if (params.expert_ids == nullptr) return;
  Acc<T>* probabilities = sums.probabilities.data();
  for_each_vector<T>(params.num_experts, [&](int64_t i, int count) {
    const Vec<T> probability = exp(load_logits(logits + i, count) - lse.max) / lse.sum;
    store_lanes(probabilities + i, load_lanes(probabilities + i, count) + probability, count);
  });
  for (int64_t j = token * params.top_k; j < (token + 1) * params.top_k; ++j) {
    const int32_t expert = params.expert_ids[j];
    if (expert >= 0 && expert < params.num_experts) ++sums.choices[expert];
  }
}

template <typename T>
void forward(const RouterLossesForwardParams& params) {
  using A = Acc<T>;
  const int64_t experts = params.expert_ids != nullptr ? params.num_experts : 0;
  std::vector<BlockSums<A>> blocks((params.num_tokens + kRouterLossesBlock - 1) / kRouterLossesBlock);
  parallel_blocks(params.num_tokens, kRouterLossesBlock, [&](int64_t block, int64_t begin, int64_t end) {
    BlockSums<A>& sums = blocks[block];
    sums.probabilities.resize(experts);
    sums.choices.resize(experts);
    for (int64_t token = begin; token < end; ++token) {
      if (params.mask == nullptr || params.mask[token]) {
        add_token<T>(params, token, sums);
      } else {
        reinterpret_cast<A*>(params.lse)[token] = 0;
      }
    }
  });
  BlockSums<double> total{std::vector<double>(params.num_experts), std::vector<int32_t>(params.num_experts)};
  for (const BlockSums<A>& sums : blocks) {
    total.squares += sums.squares;
    total.num_counted += sums.num_counted;
    for (int64_t e = 0; e < experts; ++e) {
      total.probabilities[e] += sums.probabilities[e];
      total.choices[e] += sums.choices[e];
    }
  }
  const double count = std::max(total.num_counted, 1);
  A* fractions = reinterpret_cast<A*>(params.fractions);
  double balance = 0, sum = 0;
  for (int64_t e = 0; e < params.num_experts; ++e) {
    balance += total.choices[e] * total.probabilities[e];
    sum += total.choices[e];
  }
  for (int64_t e = 0; e < params.num_experts; ++e) {
    const double centred = total.choices[e] - sum / static_cast<double>(params.num_experts);
    fractions[e] = static_cast<A>(centred / (count * params.divisor));
  }
  const double scale = static_cast<double>(params.num_experts) / (count * count * params.divisor);
  *reinterpret_cast<A*>(params.balance) = static_cast<A>(balance * scale);
  *reinterpret_cast<A*>(params.z) = static_cast<A>(total.squares / count);
  *params.num_counted = total.num_counted;
}

template <typename T>
void backward_row(const RouterLossesBackwardParams& params, int64_t token, Acc<T> dbalance, Acc<T> dz) {
  const T* logits = static_cast<const T*>(params.router_logits) + token * params.logits_stride;
  T* dlogits = static_cast<T*>(params.drouter_logits) + token * params.num_experts;
  if (params.mask != nullptr && !params.mask[token]) {
    std::fill_n(dlogits, params.num_experts, T{});
    return;
  }
  const auto* fractions = reinterpret_cast<const Acc<T>*>(params.fractions);
  const Acc<T> lse = reinterpret_cast<const Acc<T>*>(params.lse)[token];
  Vec<T> products{};
  for_each_vector<T>(dbalance != 0 ? params.num_experts : 0, [&](int64_t i, int count) {
    products += exp(load_logits(logits + i, count) - lse) * load_lanes(fractions + i, count);
  });
  const Acc<T> constant = dz * 2 * lse - dbalance * reduce_add(products);
  for_each_vector<T>(params.num_experts, [&](int64_t i, int count) {
    Vec<T> factor = splat<Vec<T>>(constant);
    if (dbalance != 0) factor += dbalance * load_lanes(fractions + i, count);
    store_lanes(dlogits + i, exp(load_logits(logits + i, count) - lse) * factor, count);
  });
}

}  // namespace

void router_losses_forward(const RouterLossesForwardParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(params); });
}

void router_losses_backward(const RouterLossesBackwardParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const A count = static_cast<A>(std::max(*params.num_counted, 1));
    const auto value = [](const float* p) { return p == nullptr ? A{0} : *reinterpret_cast<const A*>(p); };
    const A dbalance = value(params.dbalance) * static_cast<A>(params.num_experts) / count;
    const A dz = value(params.dz) / count;
    parallel_for(params.num_tokens, grain_for(params.num_experts), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) backward_row<T>(params, token, dbalance, dz);
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
