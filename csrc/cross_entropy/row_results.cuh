// What becomes of a row once its statistics are known: its losses and its gradient.
#pragma once

#include "cross_entropy/row_statistics.cuh"

namespace arfast {

// Whether the row has a loss; if not, what its gradient and its loss are.
__device__ inline bool row_counts(const CrossEntropyParams& params, int64_t target, float* instead) {
  *instead = target == params.ignore_index ? 0.0f : __uint_as_float(0x7fc00000u);
  return target >= 0 && target < params.vocab_size && target != params.ignore_index;
}

__device__ inline float target_weight(const CrossEntropyParams& params, int64_t target) {
  return params.weight != nullptr ? params.weight[target] : 1.0f;
}

__device__ inline void write_row(const CrossEntropyParams& params, int64_t row, float ce, float z, float max,
                                 float log_sum) {
  params.ce[row] = ce;
  params.z[row] = z;
  params.statistics[2 * row] = max;
  params.statistics[2 * row + 1] = log_sum;
}

// The losses of a row from its statistics, by one thread.
__device__ inline void finish_row(const CrossEntropyParams& params, int64_t row, const RowStatistics& all,
                                  int64_t target, float z_target) {
  const float eps = static_cast<float>(params.label_smoothing);
  const float log_sum = logf(all.sum), lse = all.max + log_sum;
  float loss = 0;
  // eps == 1 must not turn an infinite logit of the target into NaN, nor eps == 0 one elsewhere.
  if (eps < 1) loss += (1 - eps) * target_weight(params, target) * (all.max - z_target + log_sum);
  if (eps > 0) loss += eps / static_cast<float>(params.vocab_size) * all.smoothing_loss(log_sum);
  write_row(params, row, loss, static_cast<float>(params.z_loss) * lse * lse, all.max, log_sum);
}

// What the gradient of a row needs beside its logits.
struct GradientScales {
  float max;          // of z'
  float probability;  // of exp(z' - max)
  float uniform;      // of the class weights
  float target;       // subtracted at the target
};

__device__ inline GradientScales gradient_scales(const CrossEntropyParams& params, const CrossEntropyTotals& totals,
                                                 int64_t row, int64_t target, float max, float sum, float log_sum) {
  const float eps = static_cast<float>(params.label_smoothing);
  const float upstream = params.row_scale != nullptr ? params.row_scale[row] : 1.0f;
  const float ce_scale = static_cast<float>(totals.ce_scale) * upstream;
  const float per_class = eps / static_cast<float>(params.vocab_size);
  const float on_target = (1 - eps) * target_weight(params, target);
  const float on_probability =
      ce_scale * (on_target + per_class * static_cast<float>(totals.weight_sum)) +
      static_cast<float>(totals.z_scale) * upstream * 2 * static_cast<float>(params.z_loss) * (max + log_sum);
  return {max, on_probability / sum, ce_scale * per_class, ce_scale * on_target};
}

// The gradient of one vector of logits. The column of the target is corrected in float, before the only rounding.
template <typename T>
__device__ inline Vector16<T> gradient_of(const CrossEntropyParams& params, const Vector16<T>& logits,
                                          int64_t first_column, int64_t target, const GradientScales& scales) {
  constexpr int kSize = Vector16<T>::kSize;
  const float cap = static_cast<float>(params.softcap);
  float z[kSize], gradient[kSize];
  capped_logits(logits, cap, z);
  const auto gradient_at = [&](int i, float weight) {
    return exp_approx(z[i] - scales.max) * scales.probability - scales.uniform * weight;
  };
  if (params.weight == nullptr) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) gradient[i] = gradient_at(i, 1.0f);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int64_t column = first_column + i;
      gradient[i] = gradient_at(i, column >= 0 && column < params.vocab_size ? params.weight[column] : 1.0f);
    }
  }
  if (const int64_t at = target - first_column; at >= 0 && at < kSize) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) gradient[i] -= i == at ? scales.target : 0.0f;
  }
  if (cap > 0) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) gradient[i] *= 1 - (z[i] / cap) * (z[i] / cap);
  }
  Vector16<T> out;
#pragma unroll
  for (int i = 0; i < kSize; ++i) out.elements[i] = from_float<T>(gradient[i]);
  return out;
}

// Ignored rows have a gradient of zero; those with a target that is no class, of NaN: it shows, and nothing waits.
template <typename T>
__device__ inline void fill_gradient(const CrossEntropyParams& params, int64_t row, int64_t first, int64_t step,
                                     float value) {
  const RowOf<T> out(static_cast<T*>(params.dlogits) + row * params.dlogits_stride, params.vocab_size);
  const Vector16<T> filled = filled_with<T>(value);
  for (int64_t j = first; j < out.num_vectors(); j += step) out.store(out.column(j), filled);
}

// By the thread that holds the target's logit.
__device__ inline void finish_target(const CrossEntropyParams& params, int64_t row, const RowStatistics& all,
                                     int64_t target, const TargetLogit& of_target) {
  if (!of_target.held) return;
  finish_row(params, row, all, target, capped(of_target.z, static_cast<float>(params.softcap)));
}

// Writes the gradient of a row whose statistics are known.
template <typename T>
class RowGradient {
 public:
  __device__ RowGradient(const CrossEntropyParams& params, const CrossEntropyTotals& totals, int64_t row,
                         int64_t target, float max, float sum, float log_sum)
      : params_(params),
        target_(target),
        scales_(gradient_scales(params, totals, row, target, max, sum, log_sum)),
        out_(static_cast<T*>(params.dlogits) + row * params.dlogits_stride, params.vocab_size) {}
  __device__ RowGradient(const CrossEntropyParams& params, const CrossEntropyTotals& totals, int64_t row,
                         int64_t target, const RowStatistics& all)
      : RowGradient(params, totals, row, target, all.max, all.sum, logf(all.sum)) {}

  __device__ __forceinline__ void store(const Vector16<T>& logits, int64_t first_column) const {
    out_.store(first_column, gradient_of(params_, logits, first_column, target_, scales_));
  }

 private:
  const CrossEntropyParams& params_;
  int64_t target_;
  GradientScales scales_;
  RowOf<T> out_;
};

}  // namespace arfast
