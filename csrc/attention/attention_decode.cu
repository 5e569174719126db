// Attention of a few queries to a long cache on the GPU, bound by reading the cache: a block takes a range of keys of
// one key-value head for all queries that share it (grouped queries: Ainslie et al. 2023, arXiv 2305.13245), by one of
// two kernels, and the ranges of a sequence are merged here. A range, and who computes it, is the same whatever the
// batch is.
#include "attention/attention_decode_cuda.cuh"

namespace arfast {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;

// A row of a sequence that has several ranges: each warp takes every kWarps-th of them, so that a long sequence waits
// for the memory a few times only.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_decode_merge_kernel(AttentionDecodeParams params) {
  constexpr int kColumns = kHeadDim / kWarpSize;
  auto& smem = shared_storage<SoftmaxParts<kWarps, 1, kHeadDim>>();
  ptx::grid_dependency_wait();
  const DecodeRows rows(params);
  const int64_t index = blockIdx.x;
  const int head = static_cast<int>(index % params.num_heads);
  const int query = static_cast<int>(index / params.num_heads % params.num_queries);
  const int sequence = static_cast<int>(index / (params.num_heads * params.num_queries));
  const DecodeSplits splits(sequence_length(params, sequence), params.num_queries, params.window, params.num_splits);
  if (splits.count <= 1) return;
  const int count = static_cast<int>(splits.count), head_dim = static_cast<int>(params.head_dim);
  const float* first = partial_of(params, sequence, head / rows.group, 0, query * rows.group + head % rows.group);
  const int64_t stride = rows.count * (params.head_dim + 2);  // to the next range
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const float scale = score_scale(params);
  float top = -INFINITY, sum = 0, values[kColumns] = {};
#pragma unroll 4
  for (int split = warp; split < count; split += kWarps) {
    const float* partial = first + split * stride;
    const float max = partial[head_dim], next = fmaxf(top, max), shift = next == -INFINITY ? 0.0f : next;
    const float before = ptx::exp2_approx((top - shift) * scale), weight = ptx::exp2_approx((max - shift) * scale);
    top = next;
    sum = sum * before + partial[head_dim + 1] * weight;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = lane + i * kWarpSize;
      values[i] = values[i] * before + (column < head_dim ? partial[column] : 0.0f) * weight;
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) smem.sums[warp][0][lane + i * kWarpSize] = values[i];
  if (lane == 0) {
    smem.max[warp][0] = top;
    smem.sum[warp][0] = sum;
  }
  __syncthreads();
  if (warp == 0) smem.merge(params, 0, head, output_row<T>(params, sequence, query, head), nullptr);
}

template <typename T, int kHeadDim>
const char* launch_merge(const AttentionDecodeParams& params, void* stream) {
  const int64_t outputs = params.batch * params.num_queries * params.num_heads;
  if (outputs > 0x7fffffff) return "batch, heads and queries must make fewer than 2^31 rows";
  LaunchShape shape{dim3(static_cast<unsigned>(outputs)), dim3(kThreads), sizeof(SoftmaxParts<kWarps, 1, kHeadDim>)};
  shape.programmatic = true;
  return launch(attention_decode_merge_kernel<T, kHeadDim>, shape, stream, params);
}

}  // namespace

const char* attention_decode_cuda(const AttentionDecodeParams& params, void* stream) {
  if (params.capacity >= kMaxPositions) return "the cache must hold fewer than 2^29 keys per sequence";
  DecodeKernel kernel = params.kernel;
  if (kernel == DecodeKernel::kChoose) {
    kernel = choose_decode_kernel(params.dtype, params.num_queries, params.num_heads / params.num_kv_heads);
  }
  const char* error =
      kernel == DecodeKernel::kPlain ? launch_decode_plain(params, stream) : launch_decode_tensor_cores(params, stream);
  if (error != nullptr || params.max_splits == 1) return error;
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.head_dim <= 64) return launch_merge<T, 64>(params, stream);
    if (params.head_dim <= 128) return launch_merge<T, 128>(params, stream);
    return launch_merge<T, 256>(params, stream);
  });
}

}  // namespace arfast
