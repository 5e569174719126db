// Attention of queries to keys and values on the tensor cores of any GPU from sm_80 on (Dao 2023, arXiv 2307.08691,
// algorithm 1). A block has a tile of queries of one head and walks over tiles of keys, from the last one that it sees
// to the first; each warp has rows of its own and keeps their sums and the output in registers, so that the softmax
// needs no other warp. While the scores are computed the values arrive, and during the rest the next keys.
#include "attention/attention_cuda.cuh"
#include "core/runtime.cuh"

namespace arfast {
namespace {

// What a block works with: kWarps warps of kRowTiles times 16 queries each.
template <typename Element, int kHeadDim_, int kKeys_, int kWarps_, int kRowTiles_>
struct ForwardShape {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kThreads = kWarps_ * kWarpSize;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kWarpQueries = kRowTiles * 16;
  static constexpr int kQueries = kWarps_ * kWarpQueries;

  using Queries = MatrixTile<T, kQueries, kHeadDim>;
  using Keys = MatrixTile<T, kKeys, kHeadDim>;
  struct Smem {
    Queries q;
    Keys k, v;
  };
};

template <typename Shape>
using Scores = float[Shape::kRowTiles][Shape::kKeys / 8][4];
template <typename Shape>
using Weights = uint32_t[Shape::kKeys / 16][Shape::kRowTiles][4];
template <typename Shape>
using Output = float[Shape::kRowTiles][Shape::kHeadDim / 8][4];

// Applies the softcap and hides what a query does not see. `first_query` is that of the 16.
template <typename Shape>
__device__ void finish_scores(const AttentionProblem& problem, const KeyRange& visible, int first_query, int first_key,
                              bool masked, float (&scores)[Shape::kKeys / 8][4]) {
  if (problem.softcap > 0) cap_scores(problem.softmax_scale, problem.softcap, scores);
  if (!masked) return;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first_query + 8 * half + lane / 4;
    const int first = visible.begin(query) - first_key, end = visible.end(query) - first_key;
#pragma unroll
    for (int i = 0; i < Shape::kKeys / 4; ++i) {
      const int column = i / 2 * 8 + 2 * (lane % 4) + i % 2;
      if (column < first || column >= end) scores[i / 2][2 * half + i % 2] = -INFINITY;
    }
  }
}

// The output and the log-sum-exp of the warp's queries. The output goes through the rows of smem.q that were this
// warp's alone, and that it has read before the last barrier, so that whole vectors leave.
template <typename Shape>
__device__ void write_rows(const AttentionForwardParams& params, const SequenceTile& tile, int head, int first_row,
                           const AttentionSoftmax<Shape::kRowTiles>& softmax, const Output<Shape>& output,
                           typename Shape::Smem& smem) {
  using T = typename Shape::T;
  const AttentionProblem& problem = params.problem;
  const int lane = threadIdx.x % kWarpSize;
  float* lse = static_cast<float*>(params.lse) + tile.statistic_index(problem, head) + tile.first;
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = warp_sum<kRowLanes>(softmax.sum[m][half]);
      inverse[half] = sum == 0 ? 0.0f : 1 / sum;
      const int row = first_row + 16 * m + 8 * half + lane / 4;
      if (lane % 4 != 0 || row >= tile.num_rows) continue;
      lse[row] = softmax.max[m][half] * (softmax.scale / kLog2E) + logf(sum);
    }
    smem.q.store_accumulators(first_row + 16 * m, 0, output[m], inverse);
  }
  __syncwarp();
  const HeadsView out = dense_view(problem, params.out, problem.num_queries, problem.num_heads);
  const int rows = min(tile.num_rows - first_row, Shape::kWarpQueries);
  smem.q.write_rows(tile.queries<T>(out, head).from(tile.first + first_row), first_row, rows,
                    static_cast<int>(problem.head_dim));
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) attention_forward_kernel(AttentionForwardParams params) {
  using T = typename Shape::T;
  typename Shape::Smem& smem = shared_storage<typename Shape::Smem>();
  const AttentionProblem& problem = params.problem;
  const int head = static_cast<int>(blockIdx.x % problem.num_heads);
  const SequenceTile tile = find_tile<Shape::kQueries, false>(problem, blockIdx.x / problem.num_heads);
  if (tile.num_rows <= 0) return;
  const int kv_head = head / static_cast<int>(problem.num_heads / problem.num_kv_heads);
  const MatrixRows<T> q = tile.queries<T>(problem.q, head).from(tile.first), k = tile.keys<T>(problem.k, kv_head),
                      v = tile.keys<T>(problem.v, kv_head);
  const int head_dim = static_cast<int>(problem.head_dim);
  const KeyRange visible(problem, tile);
  const int last_query = tile.first + tile.num_rows - 1;
  const TileRange tiles = visible.key_tiles(Shape::kKeys, tile.first, last_query);
  const int first_row = static_cast<int>(threadIdx.x) / kWarpSize * Shape::kWarpQueries;

  const uint32_t q_address = smem.q.a_address(first_row), k_address = smem.k.b_address(0),
                 v_address = smem.v.transposed_b_address(0);

  const bool has_sink = problem.sink != nullptr && !tile.padding;
  const float sink = has_sink ? static_cast<const float*>(problem.sink)[head] : -INFINITY;
  AttentionSoftmax<Shape::kRowTiles> softmax(problem.softmax_scale, problem.softcap, sink);
  Output<Shape> output = {};
  const auto load_tile = [&](auto& shared, const MatrixRows<T>& rows, int key_tile) {
    const int first_key = key_tile * Shape::kKeys;
    shared.template load<Shape::kThreads>(rows.from(first_key), tile.seqlen_k - first_key, head_dim);
    ptx::cp_async_commit();
  };
  if (tiles.first < tiles.end) {
    smem.q.template load<Shape::kThreads>(q, tile.num_rows, head_dim);
    load_tile(smem.k, k, tiles.end - 1);
  }
  for (int key_tile = tiles.end - 1; key_tile >= tiles.first; --key_tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the keys are there, and nobody reads the last values any more
    load_tile(smem.v, v, key_tile);
    const int first_key = key_tile * Shape::kKeys;
    // Of all rows of the tile, whether they exist or not: fewer values to keep.
    const int last_key = first_key + Shape::kKeys - 1;
    const bool masked = last_key >= visible.seqlen_k ||
                        visible.hides(tile.first, tile.first + Shape::kQueries - 1, first_key, last_key);
    Scores<Shape> scores;
    multiply_rows<typename Shape::Queries, typename Shape::Keys>(q_address, k_address, scores);
    Weights<Shape> weights;
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      finish_scores<Shape>(problem, visible, tile.first + first_row + 16 * m, first_key, masked, scores[m]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = softmax.update(m, half, scores[m]);
#pragma unroll
        for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
          output[m][n][2 * half] *= factor;
          output[m][n][2 * half + 1] *= factor;
        }
      }
#pragma unroll
      for (int k = 0; k < Shape::kKeys / 16; ++k) {
        fragment_from_accumulators<T>(weights[k][m], scores[m][2 * k], scores[m][2 * k + 1]);
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // the values are there, and nobody reads these keys any more
    if (key_tile > tiles.first) load_tile(smem.k, k, key_tile - 1);
    multiply_columns<typename Shape::Keys>(weights, v_address, output);
  }
  write_rows<Shape>(params, tile, head, first_row, softmax, output, smem);
}

// The last shape of each head dimension fits the 99 KB of sm_86 and sm_89.
template <typename T>
const char* launch_forward(const AttentionForwardParams& params, void* stream) {
  const auto launch_shape = [&](auto type) -> const char* {
    using Shape = typename decltype(type)::type;
    const AttentionProblem& problem = params.problem;
    const int64_t blocks = num_tiles<Shape::kQueries>(problem, problem.num_queries) * problem.num_heads;
    if (blocks > 0x7fffffff) return "the number of query tiles times heads must be below 2^31";
    const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads), sizeof(typename Shape::Smem)};
    return launch(attention_forward_kernel<Shape>, shape, stream, params);
  };
  switch (attention_padded_head_dim(params.problem.head_dim)) {
    case 64:
      return launch_shape(TypeOf<ForwardShape<T, 64, 64, 4, 2>>{});
    case 96:
      return launch_shape(TypeOf<ForwardShape<T, 96, 64, 4, 2>>{});
    case 128:
      return launch_shape(TypeOf<ForwardShape<T, 128, 64, 4, 2>>{});
    default:
      return with_first_that_fits<ForwardShape<T, 256, 64, 8, 1>, ForwardShape<T, 256, 32, 4, 1>>(launch_shape);
  }
}

}  // namespace

const char* attention_forward_cuda(const AttentionForwardParams& params, void* stream) {
  if (const char* error = refused(params.problem)) return error;
  return dispatch_tensor_core_dtype(
      params.problem.dtype, [&](auto tag) { return launch_forward<typename decltype(tag)::type>(params, stream); });
}

}  // namespace arfast
