// What all rows of a cross-entropy share, before and after them: the denominators of the mean, and the sum of the
// losses. One block each, in a fixed order and in double: the same bits at every run, and no wait for the host.
#include "core/reduce.cuh"
#include "core/runtime.cuh"
#include "cross_entropy/cross_entropy.h"

namespace arfast {
namespace {

constexpr int kThreads = 1024;

struct Smem {
  double scratch[kThreads / kWarpSize];
};

// The sum over the block, for every thread.
__device__ double block_total(double value, double* scratch) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  __syncthreads();  // scratch may still be read from the call before
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = scratch[threadIdx.x % kWarpSize];
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__global__ void __launch_bounds__(kThreads) cross_entropy_totals_kernel(CrossEntropyTotalsParams params) {
  Smem& smem = shared_storage<Smem>();
  const bool mean = params.reduction == kReductionMean, counted = mean && params.num_items == 0;
  double num_kept = 0, kept_weight = 0, weight_sum = 0;
  for (int64_t i = threadIdx.x; counted && i < params.num_rows; i += kThreads) {
    const int64_t target = params.targets[i];
    if (target == params.ignore_index || target < 0 || target >= params.vocab_size) continue;
    num_kept += 1;
    kept_weight += params.weight != nullptr ? static_cast<double>(params.weight[target]) : 1.0;
  }
  for (int64_t v = threadIdx.x; params.weight != nullptr && v < params.vocab_size; v += kThreads) {
    weight_sum += static_cast<double>(params.weight[v]);
  }
  num_kept = block_total(num_kept, smem.scratch);
  kept_weight = block_total(kept_weight, smem.scratch);
  weight_sum = block_total(weight_sum, smem.scratch);
  if (threadIdx.x != 0) return;
  params.totals->weight_sum = params.weight != nullptr ? weight_sum : static_cast<double>(params.vocab_size);
  params.totals->ce_scale = mean ? 1 / (counted ? kept_weight : params.num_items) : 1.0;
  params.totals->z_scale = mean ? 1 / (counted ? num_kept : params.num_items) : 1.0;
}

__global__ void __launch_bounds__(kThreads) cross_entropy_sum_kernel(CrossEntropyReduceParams params) {
  Smem& smem = shared_storage<Smem>();
  double ce = 0, z = 0;
  for (int64_t i = threadIdx.x; i < params.num_rows; i += kThreads) {
    ce += static_cast<double>(params.ce[i]);
    z += static_cast<double>(params.z[i]);
  }
  ce = block_total(ce, smem.scratch);
  z = block_total(z, smem.scratch);
  if (threadIdx.x != 0) return;
  *params.loss = static_cast<float>(ce * params.totals->ce_scale + z * params.totals->z_scale);
}

__global__ void __launch_bounds__(kThreads) cross_entropy_add_kernel(CrossEntropyReduceParams params) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < params.num_rows) params.loss[i] = params.ce[i] + params.z[i];
}

}  // namespace

const char* cross_entropy_totals_cuda(const CrossEntropyTotalsParams& params, void* stream) {
  return launch(cross_entropy_totals_kernel, LaunchShape{dim3(1), dim3(kThreads), sizeof(Smem)}, stream, params);
}

const char* cross_entropy_reduce_cuda(const CrossEntropyReduceParams& params, void* stream) {
  if (params.reduction != kReductionNone) {
    return launch(cross_entropy_sum_kernel, LaunchShape{dim3(1), dim3(kThreads), sizeof(Smem)}, stream, params);
  }
  if (params.num_rows == 0) return nullptr;
  const dim3 blocks(static_cast<unsigned>((params.num_rows + kThreads - 1) / kThreads));
  return launch(cross_entropy_add_kernel, LaunchShape{blocks, dim3(kThreads), 0}, stream, params);
}

}  // namespace arfast
