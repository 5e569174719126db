// Label-smoothed cross-entropy on the CPU (Szegedy et al. 2015, arXiv 1512.00567, section 7; z-loss: de Brebisson and
// Vincent 2016, arXiv 1604.08859): threads over rows. A row comes from memory once: the second pass, which writes the
// gradient, finds it and its exponentials in the cache, and may write it in place.
#include <algorithm>
#include <cmath>

#include "core/arena.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "cross_entropy/cross_entropy.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// Elements whose maximum is taken before they are exponentiated: 8 KiB of floats, read twice from the first-level
// cache.
constexpr int64_t kTile = 2048;

struct Statistics {
  double max;         // of z'
  double sum;         // of exp(z' - max)
  double logits_sum;  // of w z', when there is smoothing
};

// exp(z' - shift) of a row, each tile with the shift it had when the statistics came to it: half the work of the
// gradient.
template <typename A>
struct Exponentials {
  explicit Exponentials(int64_t size)
      : values(thread_scratch<A, Exponentials>(size + num_tiles(size))), shifts(values + size) {}
  static int64_t num_tiles(int64_t size) { return (size + kTile - 1) / kTile; }

  A* values;  // [V]
  A* shifts;  // per tile
};

template <typename T>
inline Vec<T> capped(Vec<T> z, Acc<T> cap) {
  return cap * tanh(z * (1 / cap));
}

// Independent sums or maxima that a loop keeps, so that the latency of one does not hold up the next.
constexpr int kChains = 4;

template <typename T, bool kCap>
inline Vec<T> load_logits(const T* row, int count, Acc<T> cap) {
  const Vec<T> z = load_lanes(row, count);
  if constexpr (kCap) return capped<T>(z, cap);
  return z;
}

// Calls f(chain, offset, z', count) for the vectors of row[begin, end). Only the last one may have count < kLanes<T>;
// its lanes past the end hold `fill`.
template <typename T, bool kCap, typename F>
inline void for_each_logit(const T* row, int64_t begin, int64_t end, Acc<T> cap, Acc<T> fill, const F& f) {
  constexpr int kLane = kLanes<T>;
  int64_t i = begin;
  for (; i + kChains * kLane <= end; i += kChains * kLane) {
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) f(k, i + k * kLane, load_logits<T, kCap>(row + i + k * kLane, kLane, cap), kLane);
  }
  for (; i + kLane <= end; i += kLane) f(0, i, load_logits<T, kCap>(row + i, kLane, cap), kLane);
  if (i < end) {
    const int count = static_cast<int>(end - i);
    Vec<T> z = load_logits<T, kCap>(row + i, count, cap);
    for (int lane = count; lane < kLane; ++lane) z[lane] = fill;
    f(0, i, z, count);
  }
}

// The maximum of a tile, kept in four registers so that comparisons overlap. NaN is passed over; the sums carry it.
template <typename T, bool kCap>
Acc<T> tile_max(const T* row, int64_t begin, int64_t end, Acc<T> cap) {
  constexpr Acc<T> kLowest = -std::numeric_limits<Acc<T>>::infinity();
  Vec<T> m[kChains];
  for (Vec<T>& chain : m) chain = splat<Vec<T>>(kLowest);
  for_each_logit<T, false>(row, begin, end, cap, kLowest, [&](int k, int64_t, Vec<T> z, int) { m[k] = max(z, m[k]); });
  Acc<T> result = reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
  // tanh is monotone, so the cap of the maximum is the maximum of the capped.
  if constexpr (kCap) result = capped<T>(splat<Vec<T>>(result), cap)[0];
  return result;
}

struct TileSums {
  double exponentials;  // of exp(z' - shift)
  double logits;        // of w z', when there is smoothing
};

// w (z' - shift) is what is summed in float, not w z': the loss subtracts W lse, and what cancels there must not have
// been rounded. `kept`: where the exponentials are stored, or nullptr.
template <typename T, bool kCap, bool kSmooth, bool kWeighted>
TileSums tile_sums(const CrossEntropyParams& params, const T* row, int64_t begin, int64_t end, Acc<T> shift,
                   Acc<T>* kept) {
  constexpr Acc<T> kLowest = -std::numeric_limits<Acc<T>>::infinity();
  const Acc<T>* weight = reinterpret_cast<const Acc<T>*>(params.weight);
  Vec<T> exponentials[kChains] = {}, logits[kChains] = {}, weights[kChains] = {};
  for_each_logit<T, kCap>(row, begin, end, static_cast<Acc<T>>(params.softcap), kLowest,
                          [&](int k, int64_t i, Vec<T> z, int count) {
                            Vec<T> shifted = z - shift;
                            const Vec<T> exponential = exp(shifted);
                            exponentials[k] += exponential;
                            if (kept != nullptr) store_lanes(kept + i, exponential, count);
                            if (!kSmooth) return;
                            // 0 * -inf past the end would be NaN.
                            for (int lane = count; lane < kLanes<T>; ++lane) shifted[lane] = 0;
                            if (!kWeighted) {
                              logits[k] += shifted;
                              return;
                            }
                            const Vec<T> w = load_lanes(weight + i, count);
                            logits[k] += w * shifted;
                            weights[k] += w;
                          });
  const auto total = [](const Vec<T>(&v)[kChains]) -> double { return reduce_add((v[0] + v[1]) + (v[2] + v[3])); };
  const double total_weight = kWeighted ? total(weights) : static_cast<double>(end - begin);
  return {total(exponentials), total(logits) + total_weight * static_cast<double>(shift)};
}

// Online softmax statistics (Milakov and Gimelshein 2018, arXiv 1805.02867) tile by tile; sums leave float after each
// tile.
template <typename T, bool kCap>
Statistics row_statistics(const CrossEntropyParams& params, const T* row, const Exponentials<Acc<T>>* kept) {
  constexpr Acc<T> kLowest = -std::numeric_limits<Acc<T>>::infinity();
  const Acc<T> cap = static_cast<Acc<T>>(params.softcap);
  const bool smooth = params.label_smoothing > 0, weighted = params.weight != nullptr;
  const auto sums = !smooth    ? tile_sums<T, kCap, false, false>
                    : weighted ? tile_sums<T, kCap, true, true>
                               : tile_sums<T, kCap, true, false>;
  Statistics s{kLowest, 0, 0};
  for (int64_t begin = 0; begin < params.vocab_size; begin += kTile) {
    const int64_t end = begin + kTile < params.vocab_size ? begin + kTile : params.vocab_size;
    const double max_here = tile_max<T, kCap>(row, begin, end, cap);
    if (max_here > s.max) {
      s.sum *= s.max == kLowest ? 0.0 : std::exp(s.max - max_here);
      s.max = max_here;
    }
    // Nothing but -inf so far: -inf - -inf would be NaN.
    const Acc<T> shift = s.max == kLowest ? 0 : static_cast<Acc<T>>(s.max);
    if (kept != nullptr) kept->shifts[begin / kTile] = shift;
    const TileSums tile = sums(params, row, begin, end, shift, kept != nullptr ? kept->values : nullptr);
    s.sum += tile.exponentials;
    s.logits_sum += tile.logits;
  }
  return s;
}

// What the gradient of a row is made of: d/dz_v = probability_scale exp(z'_v - shift) - ce_scale eps / V w_v
// - [v == y] ce_scale (1 - eps) w_y. With a cap, times 1 - (z' / cap)^2.
struct GradientTerms {
  int64_t target;
  double target_weight;
  double shift;
  double probability_scale;
  double ce_scale;
};

// In double, where p - 1 cancels.
template <typename T, bool kCap>
double gradient_at_target(const CrossEntropyParams& params, const GradientTerms& terms, const T* row) {
  Vec<T> capped_target = splat<Vec<T>>(to_acc(row[terms.target]));
  if constexpr (kCap) capped_target = capped<T>(capped_target, static_cast<Acc<T>>(params.softcap));
  const Acc<T>* weight = reinterpret_cast<const Acc<T>*>(params.weight);
  const double z = capped_target[0], eps = params.label_smoothing;
  const double gradient =
      std::exp(z - terms.shift) * terms.probability_scale - terms.ce_scale * (1 - eps) * terms.target_weight -
      terms.ce_scale * eps / static_cast<double>(params.vocab_size) * (weight ? weight[terms.target] : 1);
  return kCap ? gradient * (1 - z * z / (params.softcap * params.softcap)) : gradient;
}

// The column of the target is corrected before the only rounding.
template <typename T, bool kCap>
void write_gradient(const CrossEntropyParams& params, const GradientTerms& terms, const T* row,
                    const Exponentials<Acc<T>>* kept, T* gradient) {
  using A = Acc<T>;
  const int64_t size = params.vocab_size;
  const A* weight = reinterpret_cast<const A*>(params.weight);
  const A uniform = static_cast<A>(terms.ce_scale * params.label_smoothing / static_cast<double>(size));
  const auto smoothing = [&](int64_t i, int count) {
    return uniform * (weight ? load_lanes(weight + i, count) : splat<Vec<T>>(1));
  };
  // Before the loop: in place its logit is gone afterwards.
  const A at_target = static_cast<A>(gradient_at_target<T, kCap>(params, terms, row));
  if (kept != nullptr) {
    for (int64_t begin = 0; begin < size; begin += kTile) {
      const double tile_scale = terms.probability_scale * std::exp(kept->shifts[begin / kTile] - terms.shift);
      const A scale = static_cast<A>(tile_scale);
      for_each_logit<A, false>(kept->values, begin, std::min(begin + kTile, size), 0, 0,
                               [&](int, int64_t i, Vec<T> exponential, int count) {
                                 store_lanes(gradient + i, exponential * scale - smoothing(i, count), count);
                               });
    }
  } else {
    const A cap = static_cast<A>(params.softcap), shift = static_cast<A>(terms.shift);
    const A scale = static_cast<A>(terms.probability_scale);
    for_each_logit<T, kCap>(row, 0, size, cap, 0, [&](int, int64_t i, Vec<T> z, int count) {
      Vec<T> g = exp(z - shift) * scale - smoothing(i, count);
      if constexpr (kCap) g *= 1 - z * z * (1 / (cap * cap));
      store_lanes(gradient + i, g, count);
    });
  }
  gradient[terms.target] = from_acc<T>(at_target);
}

template <typename T, bool kCap>
void process_row(const CrossEntropyParams& params, int64_t i) {
  const int64_t size = params.vocab_size, target = params.targets[i];
  const T* row = static_cast<const T*>(params.logits) + i * params.logits_stride;
  T* gradient = params.dlogits ? static_cast<T*>(params.dlogits) + i * params.dlogits_stride : nullptr;
  Acc<T>* ce = reinterpret_cast<Acc<T>*>(params.ce);
  Acc<T>* z_loss = reinterpret_cast<Acc<T>*>(params.z);
  Acc<T>* statistics = reinterpret_cast<Acc<T>*>(params.statistics) + 2 * i;
  if (target == params.ignore_index) {
    if (ce) ce[i] = z_loss[i] = statistics[0] = statistics[1] = 0;
    if (gradient) std::memset(gradient, 0, static_cast<size_t>(size) * sizeof(T));
    return;
  }
  const Acc<T>* weight = reinterpret_cast<const Acc<T>*>(params.weight);
  const CrossEntropyTotals& totals = *params.totals;
  const double eps = params.label_smoothing, per_class = eps / static_cast<double>(size);
  const double target_weight = weight ? weight[target] : 1;
  // With a cap the gradient needs z' itself.
  const bool keeps = ce != nullptr && gradient != nullptr && !kCap;
  const Exponentials<Acc<T>> exponentials(keeps ? size : 0);
  const auto* kept = keeps ? &exponentials : nullptr;
  const Statistics s =
      ce ? row_statistics<T, kCap>(params, row, kept) : Statistics{statistics[0], std::exp(double{statistics[1]}), 0};
  const double log_sum = std::log(s.sum), lse = s.max + log_sum;
  if (ce) {
    Vec<T> z = splat<Vec<T>>(to_acc(row[target]));
    if constexpr (kCap) z = capped<T>(z, static_cast<Acc<T>>(params.softcap));
    double loss = 0;
    // eps == 1 must not turn an infinite logit of the target into NaN, nor eps == 0 one elsewhere.
    if (eps < 1) loss += (1 - eps) * target_weight * (s.max - z[0] + log_sum);
    if (eps > 0) loss += per_class * (totals.weight_sum * lse - s.logits_sum);
    ce[i] = static_cast<Acc<T>>(loss);
    z_loss[i] = static_cast<Acc<T>>(params.z_loss * lse * lse);
    statistics[0] = static_cast<Acc<T>>(s.max);
    statistics[1] = static_cast<Acc<T>>(log_sum);
  }
  if (gradient == nullptr) return;
  const double upstream = params.row_scale ? reinterpret_cast<const Acc<T>*>(params.row_scale)[i] : 1;
  const double ce_scale = totals.ce_scale * upstream;
  // (1 - eps) w_y + eps / V W of the loss, and 2 z_loss lse of the z-loss
  const double on_probability = ce_scale * ((1 - eps) * target_weight + per_class * totals.weight_sum) +
                                totals.z_scale * upstream * 2 * params.z_loss * lse;
  const GradientTerms terms{target, target_weight, s.max, on_probability / s.sum, ce_scale};
  write_gradient<T, kCap>(params, terms, row, kept, gradient);
}

// Statistics and class weights are float, double for float64: calls f with that type.
template <typename F>
void dispatch_statistics(DType dtype, const F& f) {
  dtype == DType::kFloat64 ? f(TypeTag<double>{}) : f(TypeTag<float>{});
}

}  // namespace

void cross_entropy_totals(const CrossEntropyTotalsParams& params) {
  dispatch_statistics(params.dtype, [&](auto tag) {
    using Wide = typename decltype(tag)::type;
    const Wide* weight = reinterpret_cast<const Wide*>(params.weight);
    double num_kept = 0, kept_weight = 0, weight_sum = static_cast<double>(params.vocab_size);
    if (params.reduction == kReductionMean && params.num_items == 0) {
      for (int64_t i = 0; i < params.num_rows; ++i) {
        if (params.targets[i] == params.ignore_index) continue;
        num_kept += 1;
        kept_weight += weight ? weight[params.targets[i]] : 1;
      }
    }
    if (weight != nullptr) {
      weight_sum = 0;
      for (int64_t v = 0; v < params.vocab_size; ++v) weight_sum += weight[v];
    }
    const bool mean = params.reduction == kReductionMean, counted = params.num_items == 0;
    *params.totals = {weight_sum, mean ? 1 / (counted ? kept_weight : params.num_items) : 1,
                      mean ? 1 / (counted ? num_kept : params.num_items) : 1};
  });
}

void cross_entropy_reduce(const CrossEntropyReduceParams& params) {
  dispatch_statistics(params.dtype, [&](auto tag) {
    using Wide = typename decltype(tag)::type;
    const Wide *ce = reinterpret_cast<const Wide*>(params.ce), *z = reinterpret_cast<const Wide*>(params.z);
    Wide* loss = reinterpret_cast<Wide*>(params.loss);
    double ce_sum = 0, z_sum = 0;
    for (int64_t i = 0; i < params.num_rows; ++i) {
      if (params.reduction == kReductionNone) loss[i] = ce[i] + z[i];
      ce_sum += ce[i];
      z_sum += z[i];
    }
    if (params.reduction == kReductionNone) return;
    *loss = static_cast<Wide>(ce_sum * params.totals->ce_scale + z_sum * params.totals->z_scale);
  });
}

void cross_entropy(const CrossEntropyParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(params.num_rows, grain_for(params.vocab_size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        params.softcap > 0 ? process_row<T, true>(params, i) : process_row<T, false>(params, i);
      }
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
