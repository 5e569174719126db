// Root mean square normalisation on the GPU (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4): one block per row
// forward, one block per kRmsNormBlock rows backward, so that each partial sum of dweight has one owner.
#include "core/reduce.cuh"
#include "core/runtime.cuh"
#include "core/vector.cuh"
#include "rms_norm/rms_norm.h"

namespace arfast {
namespace {

constexpr int kThreads = 256;

struct Smem {
  float scratch[kThreads / kWarpSize];
};

template <typename T>
__global__ void __launch_bounds__(kThreads) rms_norm_forward_kernel(RmsNormForwardParams params) {
  Smem& smem = shared_storage<Smem>();
  const int64_t row = blockIdx.x, size = params.hidden_size;
  const T* x = static_cast<const T*>(params.x) + row * params.x_stride;
  const T* weight = static_cast<const T*>(params.weight);
  T* out = static_cast<T*>(params.out) + row * size;

  float squares = 0;
  if (params.residual != nullptr) {
    const T* residual = static_cast<const T*>(params.residual) + row * params.residual_stride;
    T* sum = static_cast<T*>(params.sum) + row * size;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      // The rounded sum is what the next layers and the backward pass see; each thread reads back only what it wrote.
      sum[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
      squares += to_float(sum[i]) * to_float(sum[i]);
    }
    x = sum;
  } else {
    for (int64_t i = threadIdx.x; i < size; i += kThreads) squares += to_float(x[i]) * to_float(x[i]);
  }
  const float mean = block_sum<kThreads>(squares, smem.scratch) / static_cast<float>(size);
  const float rstd = rsqrtf(mean + static_cast<float>(params.eps));
  if (threadIdx.x == 0) params.rstd[row] = rstd;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    out[i] = from_float<T>(to_float(x[i]) * rstd * to_float(weight[i]));
  }
}

// dx = rstd * (g - x * rstd^2 * mean(g * x)) with g = dout * weight; dweight += dout * x * rstd.
template <typename T>
__global__ void __launch_bounds__(kThreads) rms_norm_backward_kernel(RmsNormBackwardParams params) {
  Smem& smem = shared_storage<Smem>();
  const int64_t size = params.hidden_size, block = blockIdx.x;
  const int64_t begin = block * kRmsNormBlock;
  const int64_t end = begin + kRmsNormBlock < params.num_rows ? begin + kRmsNormBlock : params.num_rows;
  const T* weight = static_cast<const T*>(params.weight);
  float* dweight = static_cast<float*>(params.dweight) + block * size;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) dweight[i] = 0;

  for (int64_t row = begin; row < end; ++row) {
    const T* dout = static_cast<const T*>(params.dout) + row * params.dout_stride;
    const T* dsum = params.dsum ? static_cast<const T*>(params.dsum) + row * params.dsum_stride : nullptr;
    const T* x = static_cast<const T*>(params.x) + row * params.x_stride;
    T* dx = static_cast<T*>(params.dx) + row * size;
    const float rstd = params.rstd[row];
    float products = 0;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      const float dout_x = to_float(dout[i]) * to_float(x[i]);
      products += dout_x * to_float(weight[i]);
      dweight[i] += dout_x * rstd;
    }
    const float slope = block_sum<kThreads>(products, smem.scratch) / static_cast<float>(size) * rstd * rstd;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      const float gradient = (to_float(dout[i]) * to_float(weight[i]) - to_float(x[i]) * slope) * rstd;
      dx[i] = from_float<T>(gradient + (dsum != nullptr ? to_float(dsum[i]) : 0.0f));
    }
  }
}

}  // namespace

const char* rms_norm_forward_cuda(const RmsNormForwardParams& params, void* stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(params.num_rows)), dim3(kThreads), sizeof(Smem)};
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    return launch(rms_norm_forward_kernel<typename decltype(tag)::type>, shape, stream, params);
  });
}

const char* rms_norm_backward_cuda(const RmsNormBackwardParams& params, void* stream) {
  const int64_t blocks = (params.num_rows + kRmsNormBlock - 1) / kRmsNormBlock;
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(Smem)};
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    return launch(rms_norm_backward_kernel<typename decltype(tag)::type>, shape, stream, params);
  });
}

}  // namespace arfast
