// Rows of tokens to rows of experts and back on the GPU. Permute: a warp per row. Combine: a warp per token, whose sum
// runs over its choices in order and is rounded once.
#include "core/reduce.cuh"
#include "core/rows.cuh"
#include "core/runtime.cuh"
#include "moe_permute/moe_permute.h"

namespace arfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__device__ int64_t warp_index() { return blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize; }

template <typename T>
__global__ void __launch_bounds__(kThreads) moe_permute_kernel(MoePermuteParams params) {
  const int64_t row = warp_index();
  if (row >= params.num_rows) return;
  const int64_t size = params.hidden_size;
  const int32_t token = params.source_token[row];
  const RowOf<T> out(static_cast<T*>(params.out) + row * size, size);
  const bool exists = token >= 0 && token < params.num_tokens;
  const RowOf<const T> in(static_cast<const T*>(params.hidden) + (exists ? token : 0) * params.hidden_stride,
                          exists ? size : 0);
  if (!exists) {
    for (int64_t j = threadIdx.x % kWarpSize; j < out.num_vectors(); j += kWarpSize) {
      out.store(out.column(j), filled_with<T>(0));
    }
    return;
  }
#pragma unroll 4
  for (int64_t j = threadIdx.x % kWarpSize; j < in.num_vectors(); j += kWarpSize) out.store(in.column(j), in.load(j));
}

// The row of a choice, or -1 when there is none such.
__device__ int64_t row_of_choice(const int32_t* position, int64_t choice, int64_t num_rows) {
  const int32_t row = position[choice];
  return row >= 0 && row < num_rows ? row : -1;
}

template <typename T>
__device__ Vector16<T> rounded(const float (&values)[Vector16<T>::kSize]) {
  Vector16<T> vector;
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) vector.elements[i] = from_float<T>(values[i]);
  return vector;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) moe_combine_kernel(MoeCombineParams params) {
  constexpr int kSize = Vector16<T>::kSize;
  ptx::grid_dependency_wait();
  const int64_t token = warp_index();
  if (token >= params.num_tokens) return;
  const int64_t size = params.hidden_size, num_rows = params.num_tokens * params.top_k;
  const T* rows = static_cast<const T*>(params.expert_out);
  const RowOf<T> out(static_cast<T*>(params.out) + token * size, size);
  for (int64_t j = threadIdx.x % kWarpSize; j < out.num_vectors(); j += kWarpSize) {
    const int64_t first = out.column(j);
    float sums[kSize] = {};
    for (int64_t k = token * params.top_k; k < (token + 1) * params.top_k; ++k) {
      const int64_t row = row_of_choice(params.position, k, num_rows);
      if (row < 0) continue;
      const float weight = params.expert_weights != nullptr ? params.expert_weights[k] : 1.0f;
      const Vector16<T> values = RowOf<const T>(rows + row * params.expert_out_stride, size).at(first, 0);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[i] += weight * to_float(values.elements[i]);
    }
    out.store(first, rounded<T>(sums));
  }
}

// dexpert_out = weight * dout and dweight = dout . expert_out, a warp per choice.
template <typename T>
__global__ void __launch_bounds__(kThreads) moe_combine_backward_kernel(MoeCombineBackwardParams params) {
  constexpr int kSize = Vector16<T>::kSize;
  const int64_t choice = warp_index(), num_rows = params.num_tokens * params.top_k;
  if (choice >= num_rows) return;
  const int64_t row = row_of_choice(params.position, choice, num_rows), size = params.hidden_size;
  const int lane = threadIdx.x % kWarpSize;
  if (row < 0) {
    if (lane == 0) params.dexpert_weights[choice] = 0;
    return;
  }
  const RowOf<const T> dout(static_cast<const T*>(params.dout) + choice / params.top_k * params.dout_stride, size);
  const RowOf<const T> expert_out(static_cast<const T*>(params.expert_out) + row * params.expert_out_stride, size);
  const RowOf<T> dexpert_out(static_cast<T*>(params.dexpert_out) + row * size, size);
  const float weight = params.expert_weights[choice];
  float dot = 0;
  for (int64_t j = lane; j < dexpert_out.num_vectors(); j += kWarpSize) {
    const int64_t first = dexpert_out.column(j);
    const Vector16<T> upstream = dout.at(first, 0), values = expert_out.at(first, 0);
    float weighted[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float x = to_float(upstream.elements[i]);
      dot += x * to_float(values.elements[i]);
      weighted[i] = weight * x;
    }
    dexpert_out.store(first, rounded<T>(weighted));
  }
  dot = warp_sum(dot);
  if (lane == 0) params.dexpert_weights[choice] = dot;
}

// A warp per item. Nothing to do without items or without elements, but for the weights' gradients.
template <typename T, typename Params>
const char* launch_warps(void (*kernel)(Params), int64_t items, const Params& params, void* stream,
                         bool programmatic = false) {
  if (items == 0) return nullptr;
  LaunchShape shape{dim3(static_cast<unsigned>((items + kWarps - 1) / kWarps)), dim3(kThreads)};
  shape.programmatic = programmatic;
  return launch(kernel, shape, stream, params);
}

}  // namespace

const char* moe_permute_cuda(const MoePermuteParams& params, void* stream) {
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_warps<T>(moe_permute_kernel<T>, params.num_rows, params, stream);
  });
}

const char* moe_combine_forward_cuda(const MoeCombineParams& params, void* stream) {
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_warps<T>(moe_combine_kernel<T>, params.num_tokens, params, stream, true);
  });
}

const char* moe_combine_backward_cuda(const MoeCombineBackwardParams& params, void* stream) {
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_warps<T>(moe_combine_backward_kernel<T>, params.num_tokens * params.top_k, params, stream);
  });
}

}  // namespace arfast
