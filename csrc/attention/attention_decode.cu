// Attention of a few queries to a long cache on the GPU, bound by reading the cache: a block takes a range of keys of
// one key-value head for all queries that share it, as rows of one matrix product (grouped queries: Ainslie et al.
// 2023, arXiv 2305.13245). Its warps take different keys and are merged at the end; ranges are merged by a second
// kernel in their order (Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1). A range is the same whatever the
// batch is.
#include "attention/attention_cuda.cuh"
#include "attention/attention_decode.h"
#include "core/runtime.cuh"

namespace arfast {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 16;           // queries of a block
constexpr int kKeys = kWarps * 16;  // of a step: 16 for each warp

template <typename Element, int kHeadDim_>
struct DecodeShape {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  using Queries = MatrixTile<T, kRows, kHeadDim>;
  using Keys = MatrixTile<T, kKeys, kHeadDim>;

  struct Smem {
    Queries q;
    union {
      Keys k[2];
      float sums[kWarps][kRows][kHeadDim];  // after the last step: the warps' outputs
    };
    Keys v[2];
    float max[kWarps][kRows], sum[kWarps][kRows];
  };
};

// Queries that share a key-value head: row t * group + g is query t of the group's head g.
struct DecodeRows {
  int group, count;

  __device__ explicit DecodeRows(const AttentionDecodeParams& params)
      : group(static_cast<int>(params.num_heads / params.num_kv_heads)),
        count(static_cast<int>(params.num_queries) * group) {}
  __device__ int query(int row) const { return row / group; }
  __device__ int head(int kv_head, int row) const { return kv_head * group + row % group; }
};

// Values from the device that nobody has checked: nothing outside the cache is read whatever they are.
__device__ int sequence_length(const AttentionDecodeParams& params, int64_t sequence) {
  return max(0, min(params.seqlens[sequence], static_cast<int>(params.capacity)));
}
__device__ int cache_row(const AttentionDecodeParams& params, int32_t index) {
  return max(0, min(index, static_cast<int>(params.cache_batch) - 1));
}

// Where the cache holds the key or value of a position.
template <typename T>
__device__ const T* cached(const AttentionDecodeParams& params, const AttentionView& view, int sequence, int kv_head,
                           int position) {
  int batch = sequence, row = position;
  const int64_t table_row = sequence * params.table_stride;
  if (params.block_table != nullptr) {
    const int page_size = static_cast<int>(params.page_size);
    batch = cache_row(params, params.block_table[table_row + position / page_size]);
    row = position % page_size;
  } else if (params.beam_slots != nullptr) {
    batch = cache_row(params, params.beam_slots[table_row + position]);
  }
  return static_cast<const T*>(view.data) + batch * view.batch_stride + row * view.row_stride +
         kv_head * view.head_stride;
}

// The weighted sum of values [D] of a row of a range, its maximal score and the sum of its weights.
__device__ float* partial_of(const AttentionDecodeParams& params, int64_t sequence, int64_t kv_head, int64_t split,
                             int64_t row) {
  const int64_t range = (sequence * params.num_kv_heads + kv_head) * params.max_splits + split;
  return static_cast<float*>(params.partial) + (range * DecodeRows(params).count + row) * (params.head_dim + 2);
}

// The factor that turns a row's weighted sum of values into its output: 1 / the sum of all weights, the sink's too.
struct OutputScale {
  float scale;  // from a score to an exponent of 2
  float sink;   // as such an exponent

  __device__ OutputScale(const AttentionDecodeParams& params, int head) {
    scale = (params.softcap > 0 ? 1.0f : static_cast<float>(params.softmax_scale)) * kLog2E;
    sink = params.sink != nullptr ? static_cast<const float*>(params.sink)[head] * kLog2E : -INFINITY;
  }
  __device__ float operator()(float max, float sum) const {
    const float top = fmaxf(max * scale, sink);
    if (sum == 0 && sink == -INFINITY) return 0;
    const float weight = ptx::exp2_approx(max * scale - top);
    const float total = sum * weight + ptx::exp2_approx(sink - top);
    return weight / total;
  }
};

template <typename T>
__device__ T* output_row(const AttentionDecodeParams& params, int sequence, int query, int head) {
  const int64_t row = (sequence * params.num_queries + query) * params.num_heads + head;
  return static_cast<T*>(params.out) + row * params.head_dim;
}

// The block's rows from the warps' sums: to `out` if the range is the only one, else as a partial result.
template <typename Shape>
__device__ void merge_warps(const AttentionDecodeParams& params, const typename Shape::Smem& smem,
                            const DecodeRows& rows, int sequence, int kv_head, int split, int first_row, bool alone) {
  using T = typename Shape::T;
  const int head_dim = static_cast<int>(params.head_dim), lane = threadIdx.x % kWarpSize;
  for (int row = threadIdx.x / kWarpSize; row < min(kRows, rows.count - first_row); row += kWarps) {
    float max = -INFINITY, sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) max = fmaxf(max, smem.max[warp][row]);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += smem.sum[warp][row];
    const int query = rows.query(first_row + row), head = rows.head(kv_head, first_row + row);
    T* out = output_row<T>(params, sequence, query, head);
    float* partial = partial_of(params, sequence, kv_head, split, first_row + row);
    const float factor = alone ? OutputScale(params, head)(max, sum) : 1.0f;
    for (int i = lane; i < head_dim; i += kWarpSize) {
      float value = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) value += smem.sums[warp][row][i];
      if (alone) {
        out[i] = from_float<T>(factor == 0 ? 0.0f : value * factor);
      } else {
        partial[i] = value;
      }
    }
    if (!alone && lane == 0) {
      partial[head_dim] = max;
      partial[head_dim + 1] = sum;
    }
  }
}

template <typename Shape>
__global__ void __launch_bounds__(kThreads, Shape::kHeadDim <= 128 ? 4 : 2)
    attention_decode_kernel(AttentionDecodeParams params, int row_tiles) {
  using T = typename Shape::T;
  constexpr int kColumns = Shape::kHeadDim / 8;
  auto& smem = shared_storage<typename Shape::Smem>();
  ptx::grid_dependency_launch();
  const DecodeRows rows(params);
  int64_t index = blockIdx.x;
  const int split = static_cast<int>(index % params.max_splits);
  index /= params.max_splits;
  const int first_row = static_cast<int>(index % row_tiles) * kRows;
  index /= row_tiles;
  const int kv_head = static_cast<int>(index % params.num_kv_heads);
  const int sequence = static_cast<int>(index / params.num_kv_heads);
  const int seqlen = sequence_length(params, sequence), num_queries = static_cast<int>(params.num_queries);
  const DecodeSplits splits(seqlen, num_queries, params.window, params.num_splits);
  const bool alone = splits.count <= 1;
  if (split >= splits.count && !(alone && split == 0)) return;
  const int begin = alone && splits.count == 0 ? 0 : static_cast<int>(splits.begin(split));
  const int end = splits.count == 0 ? 0 : static_cast<int>(splits.end(split));

  const int head_dim = static_cast<int>(params.head_dim);
  const auto load = [&](int step) {
    const int first = begin + step * kKeys, left = end - first;
    const auto key = [&](int row) { return cached<T>(params, params.k, sequence, kv_head, first + row); };
    const auto value = [&](int row) { return cached<T>(params, params.v, sequence, kv_head, first + row); };
    smem.k[step % 2].template gather<kThreads>(key, left, head_dim);
    smem.v[step % 2].template gather<kThreads>(value, left, head_dim);
    ptx::cp_async_commit();
  };
  const int steps = (end - begin + kKeys - 1) / kKeys;
  if (steps > 0) {
    const auto query = [&](int row) {
      return static_cast<const T*>(params.q.data) + sequence * params.q.batch_stride +
             rows.query(first_row + row) * params.q.row_stride +
             rows.head(kv_head, first_row + row) * params.q.head_stride;
    };
    smem.q.template gather<kThreads>(query, rows.count - first_row, head_dim);
    load(0);
  }
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t q_address = smem.q.a_address(0);
  AttentionSoftmax<1> softmax(params.softmax_scale, params.softcap, -INFINITY);
  float output[1][kColumns][4] = {};
  int first_key[2], last_key[2];  // that the rows of the thread see
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half + lane / 4;
    last_key[half] = row < rows.count ? seqlen - num_queries + rows.query(row) : -1;
    const int64_t oldest = params.window >= 0 ? last_key[half] - params.window : 0;
    first_key[half] = oldest > 0 ? static_cast<int>(oldest) : 0;
  }
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step is there, and nobody reads the one before any more
    if (step + 1 < steps) load(step + 1);
    float scores[2][4];
    multiply_rows<typename Shape::Queries, typename Shape::Keys>(q_address, smem.k[stage].b_address(16 * warp), scores);
    if (params.softcap > 0) cap_scores(params.softmax_scale, params.softcap, scores);
    const int first = begin + step * kKeys + 16 * warp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + i / 2 * 8 + 2 * (lane % 4) + i % 2;
        const bool sees = key >= first_key[half] && key <= last_key[half] && key < end;
        if (!sees) scores[i / 2][2 * half + i % 2] = -INFINITY;
      }
      const float factor = softmax.update(0, half, scores);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        output[0][n][2 * half] *= factor;
        output[0][n][2 * half + 1] *= factor;
      }
    }
    uint32_t weights[1][1][4];
    fragment_from_accumulators<T>(weights[0][0], scores[0], scores[1]);
    multiply_columns<typename Shape::Keys>(weights, smem.v[stage].transposed_b_address(16 * warp), output);
  }
  float sum[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = quad_sum(softmax.sum[0][half]);
    if (lane % 4 == 0) smem.max[warp][8 * half + lane / 4] = softmax.max[0][half];
  }
  __syncthreads();  // and nobody reads keys any more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + lane / 4;
    float top = -INFINITY;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) top = fmaxf(top, smem.max[other][row]);
    const float shift = top == -INFINITY ? 0.0f : top;
    const float factor = ptx::exp2_approx((softmax.max[0][half] - shift) * softmax.scale);
    if (lane % 4 == 0) smem.sum[warp][row] = sum[half] * factor;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        smem.sums[warp][row][8 * n + 2 * (lane % 4) + i] = output[0][n][2 * half + i] * factor;
      }
    }
  }
  __syncthreads();
  merge_warps<Shape>(params, smem, rows, sequence, kv_head, split, first_row, alone);
}

// Merges the ranges of a sequence that has several: a warp for each query and head.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_decode_merge_kernel(AttentionDecodeParams params) {
  constexpr int kColumns = kHeadDim / kWarpSize;
  ptx::grid_dependency_wait();
  const int64_t index = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  if (index >= params.batch * params.num_queries * params.num_heads) return;
  const DecodeRows rows(params);
  const int head = static_cast<int>(index % params.num_heads), lane = threadIdx.x % kWarpSize;
  const int query = static_cast<int>(index / params.num_heads % params.num_queries);
  const int sequence = static_cast<int>(index / (params.num_heads * params.num_queries));
  const DecodeSplits splits(sequence_length(params, sequence), params.num_queries, params.window, params.num_splits);
  const int count = static_cast<int>(splits.count), head_dim = static_cast<int>(params.head_dim);
  if (count <= 1) return;
  const int row = query * rows.group + head % rows.group, kv_head = head / rows.group;
  const float* first = partial_of(params, sequence, kv_head, 0, row);
  const int64_t stride = rows.count * (params.head_dim + 2);  // to the next range
  float top = -INFINITY;
  for (int split = lane; split < count; split += kWarpSize) top = fmaxf(top, first[split * stride + head_dim]);
  top = warp_max(top);
  const OutputScale output_scale(params, head);
  const float shift = top == -INFINITY ? 0.0f : top;
  float sum = 0, values[kColumns] = {};
#pragma unroll 4
  for (int split = 0; split < count; ++split) {
    const float* partial = first + split * stride;
    const float weight = ptx::exp2_approx((partial[head_dim] - shift) * output_scale.scale);
    sum += weight * partial[head_dim + 1];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (lane + i * kWarpSize < head_dim) values[i] += weight * partial[lane + i * kWarpSize];
    }
  }
  const float factor = output_scale(top, sum);
  T* out = output_row<T>(params, sequence, query, head);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = lane + i * kWarpSize;
    if (column < head_dim) out[column] = from_float<T>(factor == 0 ? 0.0f : values[i] * factor);
  }
}

template <typename Shape>
const char* launch_shape(const AttentionDecodeParams& params, void* stream) {
  const int64_t rows = params.num_queries * params.num_heads / params.num_kv_heads;
  const int64_t row_tiles = (rows + kRows - 1) / kRows;
  const int64_t blocks = params.batch * params.num_kv_heads * row_tiles * params.max_splits;
  if (blocks > 0x7fffffff) return "batch, heads and splits must make fewer than 2^31 blocks";
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(typename Shape::Smem)};
  const char* error = launch(attention_decode_kernel<Shape>, shape, stream, params, static_cast<int>(row_tiles));
  if (error != nullptr || params.max_splits == 1) return error;
  const int64_t outputs = params.batch * params.num_queries * params.num_heads;
  LaunchShape merge{dim3(static_cast<unsigned>((outputs + kWarps - 1) / kWarps)), dim3(kThreads)};
  merge.programmatic = true;
  return launch(attention_decode_merge_kernel<typename Shape::T, Shape::kHeadDim>, merge, stream, params);
}

template <typename T>
const char* launch_decode(const AttentionDecodeParams& params, void* stream) {
  if (params.head_dim <= 64) return launch_shape<DecodeShape<T, 64>>(params, stream);
  if (params.head_dim <= 96) return launch_shape<DecodeShape<T, 96>>(params, stream);
  if (params.head_dim <= 128) return launch_shape<DecodeShape<T, 128>>(params, stream);
  return launch_shape<DecodeShape<T, 256>>(params, stream);
}

}  // namespace

const char* attention_decode_cuda(const AttentionDecodeParams& params, void* stream) {
  if (params.capacity >= kMaxPositions) return "the cache must hold fewer than 2^29 keys per sequence";
  return dispatch_tensor_core_dtype(
      params.dtype, [&](auto tag) { return launch_decode<typename decltype(tag)::type>(params, stream); });
}

}  // namespace arfast
