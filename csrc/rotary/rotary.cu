// Rotary position embedding on the GPU (Su et al. 2021, arXiv 2104.09864, equation 34; channels paired as in GPT-NeoX):
// a thread rotates one vector of pairs in several heads of a row by angles that it loads once.
//
// Memory bound. Element moves, each of 2 or 4 bytes: 2 (x -> out), and a float per row and channel of the tables, which
// all heads share and the L2 cache holds. As torch operations in the dtype of x, four products of halves, a difference,
// a sum and a concatenation, 9. The backward pass is the same kernel.
#include "core/elementwise.cuh"
#include "core/rotation.cuh"
#include "core/rows.cuh"
#include "rotary/rotary.h"

namespace arfast {
namespace {

constexpr int kHeads = 4;  // whose loads a thread has in flight at once

__host__ __device__ inline int64_t groups_of_heads(const RotaryParams& params) {
  return (params.num_heads + kHeads - 1) / kHeads;
}

template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads) rotary_kernel(RotaryParams params) {
  constexpr int kSize = Vector16<T>::kSize;
  const int64_t half = params.head_dim / 2, groups = groups_of_heads(params);
  for_each_vector<T>(params.num_rows * groups, half, [&](int64_t i, int64_t column) {
    const int64_t row = i / groups, head = i % groups * kHeads, table_row = row % params.table_rows;
    const int heads = static_cast<int>(min(int64_t{kHeads}, params.num_heads - head));
    const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;  // [H, D]
    T* out = static_cast<T*>(params.out) + row * params.num_heads * params.head_dim;
    uint4 a[kHeads], b[kHeads];
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (k >= heads) continue;
      a[k] = row_of<const T>(x, head + k, params.x_head_stride, half).bits_at(column, 0);
      b[k] = row_of<const T>(x + half, head + k, params.x_head_stride, half).bits_at(column, 0);
    }
    float cos[kSize], sin[kSize];
    load_floats(row_of<const float>(params.cos, table_row, half, half), column, cos);
    load_floats(row_of<const float>(params.sin, table_row, half, half), column, sin);
#pragma unroll
    for (int k = 0; k < kSize; ++k) sin[k] = params.inverse ? -sin[k] : sin[k];
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      if (k >= heads) continue;
      Vector16<T> first = from_bits<T>(a[k]), second = from_bits<T>(b[k]);
      rotate(first, second, cos, sin);
      row_of<T>(out, head + k, params.head_dim, half).store_cached(column, first);
      row_of<T>(out + half, head + k, params.head_dim, half).store_cached(column, second);
    }
  });
}

}  // namespace

const char* rotary_cuda(const RotaryParams& params, void* stream) {
  const int64_t rows = params.num_rows * groups_of_heads(params);
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(rotary_kernel<T>, elementwise_shape<T>(rows, params.head_dim / 2), stream, params);
  });
}

}  // namespace arfast
