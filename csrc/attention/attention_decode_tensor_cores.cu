// Decoding attention of many query rows per key-value head: packed as the 16 rows of mma.sync. The warps of a block
// take different keys of its range and are merged at the end.
#include "attention/attention_decode_cuda.cuh"

namespace arfast {
namespace {

constexpr int kRows = 16;  // queries of a block

template <typename Element, int kHeadDim_>
struct TensorCoreShape {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2;  // 72 KiB of shared memory at most: sm_86 and sm_89 have 99
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kKeys = kWarps * 16;  // of a step: 16 for each warp
  using Queries = MatrixTile<T, kRows, kHeadDim>;
  using Keys = MatrixTile<T, kKeys, kHeadDim>;

  struct Operands {
    Queries q;
    Keys k[2], v[2];
  };
  union Smem {
    Operands operands;
    SoftmaxParts<kWarps, kRows, kHeadDim> parts;  // after the last step
  };
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 3)
    attention_decode_tensor_core_kernel(AttentionDecodeParams params) {
  using T = typename Shape::T;
  constexpr int kColumns = Shape::kHeadDim / 8, kThreads = Shape::kThreads, kKeys = Shape::kKeys;
  auto& smem = shared_storage<typename Shape::Smem>();
  ptx::grid_dependency_launch();
  const DecodeBlock block = DecodeBlock::find<kRows>(params, blockIdx.x);
  if (!block.exists) return;

  const int head_dim = static_cast<int>(params.head_dim);
  const auto load = [&](int step) {
    const int first = block.begin + step * kKeys, left = block.end - first;
    const auto row = [&](const HeadsView& view) {
      return [&](int i) { return CacheRow(params, block.sequence, first + i).of<T>(view, block.kv_head); };
    };
    smem.operands.k[step % 2].template gather<kThreads>(row(params.k), left, head_dim);
    smem.operands.v[step % 2].template gather<kThreads>(row(params.v), left, head_dim);
    ptx::cp_async_commit();
  };
  const int steps = (block.end - block.begin + kKeys - 1) / kKeys;
  if (steps > 0) {
    const auto query = [&](int row) { return block.query<T>(params, row); };
    smem.operands.q.template gather<kThreads>(query, block.rows.count - block.first_row, head_dim);
    load(0);
  }
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t q_address = smem.operands.q.a_address(0);
  AttentionSoftmax<1> softmax(params.softmax_scale, params.softcap, -INFINITY);
  float output[1][kColumns][4] = {};
  const int position[2] = {block.position(params, lane / 4), block.position(params, 8 + lane / 4)};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step is there, and nobody reads the one before any more
    if (step + 1 < steps) load(step + 1);
    float scores[2][4];
    multiply_rows<typename Shape::Queries, typename Shape::Keys>(q_address, smem.operands.k[stage].b_address(16 * warp),
                                                                 scores);
    if (params.softcap > 0) cap_scores(params.softmax_scale, params.softcap, scores);
    const int first = block.begin + step * kKeys + 16 * warp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + i / 2 * 8 + 2 * (lane % 4) + i % 2;
        if (!block.sees(position[half], key)) scores[i / 2][2 * half + i % 2] = -INFINITY;
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
    multiply_columns<typename Shape::Keys>(weights, smem.operands.v[stage].transposed_b_address(16 * warp), output);
  }
  __syncthreads();  // nobody reads keys and values any more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + lane / 4;
    const float sum = warp_sum<kRowLanes>(softmax.sum[0][half]);
    if (lane % 4 == 0) {
      smem.parts.max[warp][row] = softmax.max[0][half];
      smem.parts.sum[warp][row] = sum;
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        smem.parts.sums[warp][row][8 * n + 2 * (lane % 4) + i] = output[0][n][2 * half + i];
      }
    }
  }
  __syncthreads();
  write_rows<T, kThreads>(params, block, smem.parts);
}

template <typename Shape>
const char* launch_shape(const AttentionDecodeParams& params, void* stream) {
  return launch_ranges<kRows, typename Shape::Smem>(attention_decode_tensor_core_kernel<Shape>, Shape::kThreads, params,
                                                    stream);
}

}  // namespace

const char* launch_decode_tensor_cores(const AttentionDecodeParams& params, void* stream) {
  return dispatch_tensor_core_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.head_dim <= 64) return launch_shape<TensorCoreShape<T, 64>>(params, stream);
    if (params.head_dim <= 96) return launch_shape<TensorCoreShape<T, 96>>(params, stream);
    if (params.head_dim <= 128) return launch_shape<TensorCoreShape<T, 128>>(params, stream);
    return launch_shape<TensorCoreShape<T, 256>>(params, stream);
  });
}

}  // namespace arfast
