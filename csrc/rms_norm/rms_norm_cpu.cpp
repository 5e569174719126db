// Root mean square normalisation on the CPU (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4): threads over rows,
// each row read from memory once and then again from the cache.
#include <cmath>

#include "core/parallel.h"
#include "core/simd.h"
#include "rms_norm/rms_norm.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

template <typename T>
void forward_row(const RmsNormForwardParams& params, int64_t row) {
  const int64_t size = params.hidden_size;
  const T* x = static_cast<const T*>(params.x) + row * params.x_stride;
  const T* weight = static_cast<const T*>(params.weight);
  T* out = static_cast<T*>(params.out) + row * size;
  Vec<T> squares{};
  if (params.residual != nullptr) {
    const T* residual = static_cast<const T*>(params.residual) + row * params.residual_stride;
    T* sum = static_cast<T*>(params.sum) + row * size;
    for_each_vector<T>(size, [&](int64_t i, int count) {
      store_lanes(sum + i, load_lanes(x + i, count) + load_lanes(residual + i, count), count);
      // The rounded sum is what the next layers and the backward pass see.
      const Vec<T> v = load_lanes(sum + i, count);
      squares += v * v;
    });
    x = sum;
  } else {
    for_each_vector<T>(size, [&](int64_t i, int count) {
      const Vec<T> v = load_lanes(x + i, count);
      squares += v * v;
    });
  }
  const Acc<T> mean = reduce_add(squares) / static_cast<Acc<T>>(size);
  const Acc<T> rstd = 1 / std::sqrt(mean + static_cast<Acc<T>>(params.eps));
  reinterpret_cast<Acc<T>*>(params.rstd)[row] = rstd;
  for_each_vector<T>(size, [&](int64_t i, int count) {
    store_lanes(out + i, load_lanes(x + i, count) * rstd * load_lanes(weight + i, count), count);
  });
}

// dx = rstd * (g - x * rstd^2 * mean(g * x)) with g = dout * weight; dweight += dout * x * rstd.
template <typename T>
void backward_row(const RmsNormBackwardParams& params, int64_t row, Acc<T>* dweight) {
  const int64_t size = params.hidden_size;
  const T* dout = static_cast<const T*>(params.dout) + row * params.dout_stride;
  const T* dsum = params.dsum ? static_cast<const T*>(params.dsum) + row * params.dsum_stride : nullptr;
  const T* x = static_cast<const T*>(params.x) + row * params.x_stride;
  const T* weight = static_cast<const T*>(params.weight);
  T* dx = static_cast<T*>(params.dx) + row * size;
  const Acc<T> rstd = reinterpret_cast<const Acc<T>*>(params.rstd)[row];
  Vec<T> products{};
  for_each_vector<T>(size, [&](int64_t i, int count) {
    const Vec<T> dout_x = load_lanes(dout + i, count) * load_lanes(x + i, count);
    products += dout_x * load_lanes(weight + i, count);
    store_lanes(dweight + i, load_lanes(dweight + i, count) + dout_x * rstd, count);
  });
  const Acc<T> slope = reduce_add(products) / static_cast<Acc<T>>(size) * rstd * rstd;
  for_each_vector<T>(size, [&](int64_t i, int count) {
    const Vec<T> g = load_lanes(dout + i, count) * load_lanes(weight + i, count);
    Vec<T> gradient = (g - load_lanes(x + i, count) * slope) * rstd;
    if (dsum != nullptr) gradient += load_lanes(dsum + i, count);
    store_lanes(dx + i, gradient, count);
  });
}

}  // namespace

void rms_norm_forward(const RmsNormForwardParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(params.num_rows, grain_for(params.hidden_size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) forward_row<T>(params, row);
    });
  });
}

void rms_norm_backward(const RmsNormBackwardParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t size = params.hidden_size;
    Acc<T>* partials = reinterpret_cast<Acc<T>*>(params.partials);
    parallel_blocks(params.num_rows, params.rows_per_partial, [&](int64_t block, int64_t begin, int64_t end) {
      Acc<T>* dweight = partials + block * size;
      for (int64_t i = 0; i < size; ++i) dweight[i] = 0;
      for (int64_t row = begin; row < end; ++row) backward_row<T>(params, row, dweight);
    });
    const int64_t num_partials = (params.num_rows + params.rows_per_partial - 1) / params.rows_per_partial;
    parallel_for(size, grain_for(num_partials), [&](int64_t begin, int64_t end) {
      for_each_vector<T>(end - begin, [&](int64_t i, int count) {
        Vec<T> sum{};
        for (int64_t block = 0; block < num_partials; ++block) {
          sum += load_lanes(partials + block * size + begin + i, count);
        }
        store_lanes(static_cast<T*>(params.dweight) + begin + i, sum, count);
      });
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
