// Rows into and out of the order by expert on the CPU, threads over rows. The weighted sum is the one of Shazeer et al.
// 2017, arXiv 1701.06538, equation 1.
#include <cstring>

#include "core/parallel.h"
#include "core/simd.h"
#include "moe_permute/moe_permute.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

template <typename T>
void combine_row(const MoeCombineParams& params, int64_t token) {
  const T* rows = static_cast<const T*>(params.expert_out);
  const int32_t* position = params.position + token * params.top_k;
  const auto* weights = reinterpret_cast<const Acc<T>*>(params.expert_weights);
  if (weights != nullptr) weights += token * params.top_k;
  T* out = static_cast<T*>(params.out) + token * params.hidden_size;
  for_each_vector<T>(params.hidden_size, [&](int64_t i, int count) {
    Vec<T> sum{};
    for (int64_t j = 0; j < params.top_k; ++j) {
      const Vec<T> row = load_lanes(rows + position[j] * params.expert_out_stride + i, count);
      sum += weights == nullptr ? row : weights[j] * row;
    }
    store_lanes(out + i, sum, count);
  });
}

template <typename T>
void combine_backward_choice(const MoeCombineBackwardParams& params, int64_t choice) {
  const int64_t size = params.hidden_size, row = params.position[choice];
  const T* dout = static_cast<const T*>(params.dout) + choice / params.top_k * params.dout_stride;
  const T* expert_out = static_cast<const T*>(params.expert_out) + row * params.expert_out_stride;
  T* dexpert_out = static_cast<T*>(params.dexpert_out) + row * size;
  const Acc<T> weight = reinterpret_cast<const Acc<T>*>(params.expert_weights)[choice];
  Vec<T> products{};
  for_each_vector<T>(size, [&](int64_t i, int count) {
    const Vec<T> incoming = load_lanes(dout + i, count);
    products += incoming * load_lanes(expert_out + i, count);
    store_lanes(dexpert_out + i, incoming * weight, count);
  });
  reinterpret_cast<Acc<T>*>(params.dexpert_weights)[choice] = reduce_add(products);
}

}  // namespace

void moe_permute(const MoePermuteParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t size = params.hidden_size;
    parallel_for(params.num_rows, grain_for(size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::memcpy(static_cast<T*>(params.out) + row * size,
                    static_cast<const T*>(params.hidden) + params.source_token[row] * params.hidden_stride,
                    size * sizeof(T));
      }
    });
  });
}

void moe_combine_forward(const MoeCombineParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(params.num_tokens, grain_for(params.top_k * params.hidden_size), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) combine_row<T>(params, token);
    });
  });
}

void moe_combine_backward(const MoeCombineBackwardParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(params.num_tokens * params.top_k, grain_for(params.hidden_size), [&](int64_t begin, int64_t end) {
      for (int64_t choice = begin; choice < end; ++choice) combine_backward_choice<T>(params, choice);
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
