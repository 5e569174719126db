// The parts of attention's backward pass on the GPU that go over rows: delta = dout . out - dlse of every query before
// the products (Dao 2023, arXiv 2307.08691, algorithm 2, line 4), and after them dq from its sums and dsink.
#include "attention/attention_backward.cuh"
#include "core/runtime.cuh"

namespace arfast {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

__host__ __device__ int64_t num_rows(const AttentionProblem& problem) {
  return (problem.cu_seqlens_q != nullptr ? 1 : problem.batch) * problem.num_heads * problem.num_queries;
}

// Row `index` of [B, H, T] or [H, N].
struct Row {
  int64_t batch, head, query;

  __device__ Row(const AttentionProblem& problem, int64_t index)
      : batch(index / (problem.num_queries * problem.num_heads)),
        head(index / problem.num_queries % problem.num_heads),
        query(index % problem.num_queries) {}
  template <typename T>
  __device__ const T* of(const HeadsView& view) const {
    return static_cast<const T*>(view.data) + batch * view.batch_stride + query * view.row_stride +
           head * view.head_stride;
  }
};

// A warp for each row.
template <typename T>
__global__ void __launch_bounds__(kThreads) attention_row_terms_kernel(AttentionBackwardParams params) {
  const AttentionProblem& problem = params.problem;
  const int64_t index = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  if (index >= num_rows(problem)) return;
  const Row row(problem, index);
  const T *out = row.of<T>(params.out), *dout = row.of<T>(params.dout);
  float delta = 0;
  for (int i = threadIdx.x % kWarpSize; i < problem.head_dim; i += kWarpSize) {
    delta += to_float(out[i]) * to_float(dout[i]);
  }
  delta = warp_sum(delta);
  if (threadIdx.x % kWarpSize != 0) return;
  const float lse = static_cast<const float*>(params.lse)[index];
  if (params.dlse != nullptr) delta -= static_cast<const float*>(params.dlse)[index];
  reinterpret_cast<RowTerms*>(params.on_gpu.row_terms)[index] =
      lse == -INFINITY ? RowTerms{INFINITY, 0} : RowTerms{lse * kLog2E, delta};
}

// dq = softmax_scale times its sums, rounded. A warp for each row.
template <typename T>
__global__ void __launch_bounds__(kThreads) attention_query_gradient_kernel(AttentionBackwardParams params) {
  const AttentionProblem& problem = params.problem;
  const int64_t index = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  if (index >= num_rows(problem)) return;
  const HeadsView view = dense_view(problem, params.dq, problem.num_queries, problem.num_heads);
  T* dq = const_cast<T*>(Row(problem, index).of<T>(view));
  const float* sums = params.on_gpu.dq_sums + index * attention_padded_head_dim(problem.head_dim);
  const float scale = static_cast<float>(problem.softmax_scale);
  for (int i = threadIdx.x % kWarpSize; i < problem.head_dim; i += kWarpSize) dq[i] = from_float<T>(scale * sums[i]);
}

struct SinkSmem {
  float scratch[kWarps];
};

// dsink of one head: - sum over all rows of exp(sink - lse) delta. A sum of deltas alone, without the differences that
// hide how out was rounded: here delta is the sum of p dp.
__global__ void __launch_bounds__(kThreads) attention_sink_gradient_kernel(AttentionBackwardParams params) {
  SinkSmem& smem = shared_storage<SinkSmem>();
  const AttentionProblem& problem = params.problem;
  const int64_t head = blockIdx.x, batches = problem.cu_seqlens_q != nullptr ? 1 : problem.batch;
  const float sink = static_cast<const float*>(problem.sink)[head] * kLog2E;
  const auto* dlse = static_cast<const float*>(params.dlse);
  float sum = 0;
  for (int64_t batch = 0; batch < batches; ++batch) {
    const int64_t first = (batch * problem.num_heads + head) * problem.num_queries;
    for (int64_t i = first + threadIdx.x; i < first + problem.num_queries; i += kThreads) {
      const float lse = reinterpret_cast<const RowTerms*>(params.on_gpu.row_terms)[i].lse;
      const float delta = params.on_gpu.dp_sums[i] - (dlse != nullptr ? dlse[i] : 0.0f);
      if (lse < INFINITY) sum -= ptx::exp2_approx(sink - lse) * delta;
    }
  }
  sum = block_sum<kThreads>(sum, smem.scratch);
  if (threadIdx.x == 0) static_cast<float*>(params.dsink)[head] = sum;
}

const char* launch_rows(void (*kernel)(AttentionBackwardParams), const AttentionBackwardParams& params, void* stream) {
  const int64_t blocks = (num_rows(params.problem) + kWarps - 1) / kWarps;
  if (blocks > 0x7fffffff) return "the number of rows times heads must be below 2^33";
  if (blocks == 0) return nullptr;
  return launch(kernel, LaunchShape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads)}, stream, params);
}

}  // namespace

const char* launch_attention_row_terms(const AttentionBackwardParams& params, void* stream) {
  return dispatch_tensor_core_dtype(params.problem.dtype, [&](auto tag) {
    return launch_rows(attention_row_terms_kernel<typename decltype(tag)::type>, params, stream);
  });
}

const char* launch_attention_query_gradient(const AttentionBackwardParams& params, void* stream) {
  return dispatch_tensor_core_dtype(params.problem.dtype, [&](auto tag) {
    return launch_rows(attention_query_gradient_kernel<typename decltype(tag)::type>, params, stream);
  });
}

const char* launch_attention_sink_gradient(const AttentionBackwardParams& params, void* stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(params.problem.num_heads)), dim3(kThreads), sizeof(SinkSmem)};
  return launch(attention_sink_gradient_kernel, shape, stream, params);
}

}  // namespace arfast
