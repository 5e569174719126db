// Gradients of attention on the tensor cores of any GPU from sm_80 on (Dao 2023, arXiv 2307.08691, algorithm 2). A
// block has a tile of keys and walks over the tiles of queries that see them, of all heads that share the keys. dk and
// dv stay in its registers; its parts of dq it adds to sums in memory. These additions happen as they come; or, for the
// same bits in every run, in the order of the keys, from the last to the first: blocks begin in this order and wait for
// their turn at every tile of queries. The block before them had its turn there some tiles earlier.
#include "attention/attention_backward.cuh"
#include "core/runtime.cuh"

namespace arfast {
namespace {

// Tiles, how many steps of queries are in shared memory, and how the warps divide the products: kRowTiles times 16 keys
// and kQueryTiles times 16 queries for each, and a share of the columns, pairs of 8 in turn.
template <typename Element, int kHeadDim_, int kKeys_, int kQueries_, int kStages_, int kWarps_, int kRowTiles_,
          int kQueryTiles_>
struct BackwardShape {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_, kKeys = kKeys_, kQueries = kQueries_, kStages = kStages_;
  static constexpr int kWarps = kWarps_, kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kRowTiles_, kQueryTiles = kQueryTiles_;
  static constexpr int kKeyWarps = kKeys / (16 * kRowTiles), kAcross = kWarps / kKeyWarps;
  static constexpr int kQueryWarps = kQueries / (16 * kQueryTiles), kQueryAcross = kWarps / kQueryWarps;
  static constexpr int kScoreColumns = kQueries / kAcross;  // of a warp, side by side
  // dq in parts, where all of it needs more registers than there are beside dk and dv.
  static constexpr int kQueryParts = kHeadDim > 128 ? 2 : 1;
  static constexpr int kQueryColumns = kHeadDim / kQueryAcross / kQueryParts;
  static_assert(kQueries % kFewestTileQueries == 0);

  using OfKeys = MatrixTile<T, kKeys, kHeadDim>;
  using OfQueries = MatrixTile<T, kQueries, kHeadDim>;
  using Weights = MatrixTile<T, kKeys, kQueries>;
  using Scores = float[kRowTiles][kScoreColumns / 8][4];
  using KeyGradient = float[kRowTiles][kHeadDim / kAcross / 8][4];
  using QueryGradient = float[kQueryTiles][kQueryColumns / 8][4];

  struct Smem {
    OfKeys k, v;
    OfQueries q[kStages], dout[kStages];
    Weights p, ds;
    RowTerms rows[kStages][kQueries];
    float dp_sums[kKeyWarps][kQueries];
    uint32_t ticket;
  };
};

// From a score and the gradient dp of its weight p to p and the gradient of the score before scale and softcap.
struct ScoreGradient {
  float scale;  // from a score to an exponent of 2
  float cap, inner;

  __device__ explicit ScoreGradient(const AttentionProblem& problem) {
    const float softmax_scale = static_cast<float>(problem.softmax_scale);
    cap = static_cast<float>(problem.softcap);
    inner = cap > 0 ? softmax_scale / cap : 0.0f;
    scale = (cap > 0 ? cap : softmax_scale) * kLog2E;
  }
  // What is hidden has no gradient, even where dout or v is NaN. Gives p dp.
  __device__ float apply(float lse, float delta, bool hidden, float& score, float& dp) const {
    const float slope = cap > 0 ? tanh_approx(score * inner) : 0.0f;
    const float p = hidden ? 0.0f : ptx::exp2_approx(fmaf(cap > 0 ? slope : score, scale, -lse));
    const float weighted = hidden ? 0.0f : p * dp;
    dp = hidden ? 0.0f : p * (dp - delta) * (1 - slope * slope);
    score = p;
    return weighted;
  }
};

// A tile of keys of one head, and the queries that see them.
template <typename Shape>
struct Walk {
  const AttentionProblem& problem;
  SequenceTile tile;
  KeyRange visible;
  int kv_head, group;     // query heads that share the keys
  int first_step, steps;  // tiles of queries, the same of each head
  static constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys;

  __device__ Walk(const AttentionProblem& problem_, const SequenceTile& tile_, int kv_head_)
      : problem(problem_), tile(tile_), visible(problem_, tile_), kv_head(kv_head_) {
    group = static_cast<int>(problem.num_heads / problem.num_kv_heads);
    const TileRange range = visible.query_tiles(kQueries, tile.first, tile.first + tile.num_rows - 1);
    first_step = range.first;
    steps = max(range.end - range.first, 0);
  }
  __device__ int head(int iteration) const { return kv_head * group + iteration / steps; }
  __device__ int first_query(int iteration) const { return (first_step + iteration % steps) * kQueries; }

  // Whether a query of the step does not see a row of the tile of keys.
  __device__ bool masked(int first_query) const {
    const int last_query = min(first_query + kQueries, tile.seqlen_q) - 1;
    return tile.num_rows < kKeys || visible.hides(first_query, last_query, tile.first, tile.first + kKeys - 1);
  }

  // Of a step's sums: how many blocks, with later keys, add to them before, and where they are counted.
  __device__ uint32_t turn(int first_query) const {
    const int last_query = min(first_query + kQueries, tile.seqlen_q) - 1;
    return visible.later_key_tiles(kKeys, last_query, tile.first);
  }
  __device__ int64_t turn_index(int head, int first_query) const {
    const int64_t number = first_query / kQueries;
    if (problem.cu_seqlens_q != nullptr) {
      const int64_t tiles = problem.num_queries / kQueries + problem.batch;
      return head * tiles + tile.q_row / kQueries + tile.sequence + number;
    }
    const int64_t tiles = tiles_of<kQueries>(problem.num_queries);
    return (tile.batch * problem.num_heads + head) * tiles + number;
  }
};

// From the scores and dp of the calling warp to p and ds. `dp_sums` [kQueries]: the sums of p dp over its keys.
template <typename Shape, bool kMasked>
__device__ void weigh(const Walk<Shape>& walk, const RowTerms* row_terms, int first_query, int first_row,
                      int first_column, float* dp_sums, typename Shape::Scores& scores, typename Shape::Scores& dp) {
  const ScoreGradient score_gradient(walk.problem);
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int n = 0; n < Shape::kScoreColumns / 8; ++n) {
    const int column = first_column + 8 * n + 2 * (lane % 4);
    const float4 rows = *reinterpret_cast<const float4*>(row_terms + column);
    const float lse[2] = {rows.x, rows.z}, delta[2] = {rows.y, rows.w};
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < 4 * Shape::kRowTiles; ++i) {
      const int m = i / 4, j = i % 4;
      const int row = first_row + 16 * m + 8 * (j / 2) + lane / 4;
      const int key = row < walk.tile.num_rows ? walk.tile.first + row : 2 * kMaxPositions;
      const int query = first_query + column + j % 2;
      const bool hidden = kMasked && walk.visible.hides(query, query, key, key);
      sums[j % 2] += score_gradient.apply(lse[j % 2], delta[j % 2], hidden, scores[m][n][j], dp[m][n][j]);
    }
    if (walk.problem.sink == nullptr) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int offset = 4; offset < kWarpSize; offset *= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
      if (lane < 4) dp_sums[column + i] = sums[i];
    }
  }
}

// Adds a step's part of dq, and its sums of p dp, to the sums in memory.
template <typename Shape>
__device__ void add_dq(const AttentionBackwardWorkspace& sums, int64_t row, int rows, int first_row, int column_block,
                       const typename Shape::QueryGradient& gradient) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 2 * Shape::kQueryTiles; ++i) {
    const int m = i / 2, half = i % 2, query = first_row + 16 * m + 8 * half + lane / 4;
    if (query >= rows) continue;
    float* to = sums.dq_sums + (row + query) * Shape::kHeadDim + 16 * column_block + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < Shape::kQueryColumns / 8; ++n) {
      ptx::add_relaxed(to + 16 * Shape::kQueryAcross * (n / 2) + 8 * (n % 2), gradient[m][n][2 * half],
                       gradient[m][n][2 * half + 1]);
    }
  }
}
template <typename Shape>
__device__ void add_dp_sums(const AttentionBackwardWorkspace& sums, const typename Shape::Smem& smem, int64_t row,
                            int rows) {
  const int query = threadIdx.x;
  if (sums.dp_sums == nullptr || query >= min(rows, Shape::kQueries)) return;
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < Shape::kKeyWarps; ++warp) sum += smem.dp_sums[warp][query];
  atomicAdd(sums.dp_sums + row + query, sum);
}

// The rows of a warp and its share of the columns to `tile`, then all rows to memory.
template <typename Shape>
__device__ void write_key_gradient(typename Shape::OfKeys& tile, const typename Shape::KeyGradient& gradient,
                                   float factor, int first_row, int column_block,
                                   const MatrixRows<typename Shape::T>& target, int rows, int head_dim) {
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kHeadDim / Shape::kAcross / 8; n += 2) {
      tile.store_accumulators(first_row + 16 * m, 16 * (column_block + Shape::kAcross * (n / 2)),
                              reinterpret_cast<const float (&)[2][4]>(gradient[m][n]), {factor, factor});
    }
  }
  __syncthreads();
  constexpr int kOfWarp = Shape::kKeys / Shape::kWarps;
  const int first = static_cast<int>(threadIdx.x) / kWarpSize * kOfWarp;
  tile.write_rows(target.from(first), first, min(rows - first, kOfWarp), head_dim);
}

// Waits until the blocks before this one have added to a step's sums. By all threads.
__device__ void wait_for_turn(const uint32_t* counter, uint32_t turn) {
  if (threadIdx.x == 0) {
    while (ptx::load_acquire(counter) != turn) {
    }
  }
  __syncthreads();
}
__device__ void end_turn(uint32_t* counter, uint32_t turn) {
  __syncthreads();  // everybody has added
  if (threadIdx.x == 0) {
    __threadfence();
    ptx::store_release(counter, turn + 1);
  }
}

// Starts to copy the queries of a step, their dout and what belongs to the rows.
template <typename Shape>
__device__ void load_step(const Walk<Shape>& walk, const AttentionBackwardParams& params, int iteration,
                          typename Shape::Smem& smem) {
  using T = typename Shape::T;
  constexpr int kThreads = Shape::kThreads;
  const AttentionProblem& problem = walk.problem;
  const SequenceTile& tile = walk.tile;
  const int head = walk.head(iteration), first = walk.first_query(iteration), stage = iteration % Shape::kStages;
  const int left = tile.seqlen_q - first, head_dim = static_cast<int>(problem.head_dim);
  smem.q[stage].template load<kThreads>(tile.queries<T>(problem.q, head).from(first), left, head_dim);
  smem.dout[stage].template load<kThreads>(tile.queries<T>(params.dout, head).from(first), left, head_dim);
  ptx::cp_async_commit();
  const auto* rows = reinterpret_cast<const RowTerms*>(params.on_gpu.row_terms);
  rows += tile.statistic_index(problem, head) + first;
  for (int i = threadIdx.x; i < Shape::kQueries; i += kThreads) {
    smem.rows[stage][i] = i < left ? rows[i] : RowTerms{INFINITY, 0};
  }
}

// dq += ds k of a step.
template <typename Shape>
__device__ void add_query_gradient(const Walk<Shape>& walk, const AttentionBackwardWorkspace& sums, int iteration,
                                   const typename Shape::Smem& smem) {
  using OfKeys = typename Shape::OfKeys;
  using Weights = typename Shape::Weights;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int first_row = warp / Shape::kQueryAcross * 16 * Shape::kQueryTiles, across = warp % Shape::kQueryAcross;
  const int head = walk.head(iteration), first = walk.first_query(iteration), rows = walk.tile.seqlen_q - first;
  const int64_t row = walk.tile.statistic_index(walk.problem, head) + first;
  uint32_t* counter = sums.turns != nullptr ? sums.turns + 1 + walk.turn_index(head, first) : nullptr;
#pragma unroll
  for (int part = 0; part < Shape::kQueryParts; ++part) {
    const int block = across + part * Shape::kQueryColumns / 16 * Shape::kQueryAcross;
    typename Shape::QueryGradient dq = {};
    multiply_add<Weights, true, OfKeys, Shape::kQueryAcross>(
        Weights::fragment(smem.ds.transposed_a_address(0), 0, first_row / 16),
        OfKeys::fragment(smem.k.transposed_b_address(0), 0, block), dq);
    if (counter != nullptr && part == 0) wait_for_turn(counter, walk.turn(first));
    add_dq<Shape>(sums, row, rows, first_row, block, dq);
  }
  add_dp_sums<Shape>(sums, smem, row, rows);
  if (counter != nullptr) end_turn(counter, walk.turn(first));
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) attention_backward_kernel(AttentionBackwardParams params) {
  using T = typename Shape::T;
  constexpr int kThreads = Shape::kThreads;
  auto& smem = shared_storage<typename Shape::Smem>();
  const AttentionProblem& problem = params.problem;
  const bool in_turns = params.on_gpu.turns != nullptr;
  int64_t block = blockIdx.x;
  if (in_turns) {  // nothing says in which order a GPU begins blocks
    if (threadIdx.x == 0) smem.ticket = ptx::add_acquire_release(params.on_gpu.turns, 1);
    __syncthreads();
    block = smem.ticket;
  }
  const int kv_head = static_cast<int>(block % problem.num_kv_heads), head_dim = static_cast<int>(problem.head_dim);
  const SequenceTile tile = find_tile<Shape::kKeys, true>(problem, block / problem.num_kv_heads, in_turns);
  if (tile.num_rows <= 0) return;
  const Walk<Shape> walk(problem, tile, kv_head);
  const int iterations = walk.steps * walk.group;

  const auto load = [&](int iteration) { load_step(walk, params, iteration, smem); };
  if (iterations > 0) {
    smem.k.template load<kThreads>(tile.keys<T>(problem.k, kv_head).from(tile.first), tile.num_rows, head_dim);
    smem.v.template load<kThreads>(tile.keys<T>(problem.v, kv_head).from(tile.first), tile.num_rows, head_dim);
    load(0);
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int key_warp = warp / Shape::kAcross, across = warp % Shape::kAcross,
            first_row = key_warp * 16 * Shape::kRowTiles;
  const int first_column = across * Shape::kScoreColumns;
  using OfKeys = typename Shape::OfKeys;
  using OfQueries = typename Shape::OfQueries;
  using Weights = typename Shape::Weights;
  typename Shape::KeyGradient dk = {}, dv = {};
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const int stage = iteration % Shape::kStages, first = walk.first_query(iteration);
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step is there, and nobody reads the one before any more
    if (Shape::kStages > 1 && iteration + 1 < iterations) load(iteration + 1);
    // Rows of the accumulators are keys, columns queries.
    typename Shape::Scores scores, dp;
    multiply_rows<OfKeys, OfQueries>(smem.k.a_address(first_row), smem.q[stage].b_address(first_column), scores);
    multiply_rows<OfKeys, OfQueries>(smem.v.a_address(first_row), smem.dout[stage].b_address(first_column), dp);
    if (walk.masked(first)) {
      weigh<Shape, true>(walk, smem.rows[stage], first, first_row, first_column, smem.dp_sums[key_warp], scores, dp);
    } else {
      weigh<Shape, false>(walk, smem.rows[stage], first, first_row, first_column, smem.dp_sums[key_warp], scores, dp);
    }
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      smem.p.store_accumulators(first_row + 16 * m, first_column, scores[m], {1.0f, 1.0f});
      smem.ds.store_accumulators(first_row + 16 * m, first_column, dp[m], {1.0f, 1.0f});
    }
    __syncthreads();  // p and ds of all warps are there
    multiply_add<Weights, false, OfQueries, Shape::kAcross>(
        smem.p.a_address(first_row), OfQueries::fragment(smem.dout[stage].transposed_b_address(0), 0, across), dv);
    multiply_add<Weights, false, OfQueries, Shape::kAcross>(
        smem.ds.a_address(first_row), OfQueries::fragment(smem.q[stage].transposed_b_address(0), 0, across), dk);
    add_query_gradient(walk, params.on_gpu, iteration, smem);
    if (Shape::kStages == 1 && iteration + 1 < iterations) {
      __syncthreads();  // nobody reads this step any more
      load(iteration + 1);
    }
  }
  const auto write = [&](OfKeys& own, const typename Shape::KeyGradient& gradient, float factor, void* to) {
    const HeadsView view = dense_view(problem, to, problem.num_keys, problem.num_kv_heads);
    write_key_gradient<Shape>(own, gradient, factor, first_row, across, tile.keys<T>(view, kv_head).from(tile.first),
                              tile.num_rows, head_dim);
  };
  write(smem.v, dv, 1.0f, params.dv);  // values are not read after the last step's barrier, and by this one's, no keys
  write(smem.k, dk, static_cast<float>(problem.softmax_scale), params.dk);
}

// The last shape of each head dimension fits the 99 KB of sm_86 and sm_89.
template <typename T>
const char* launch_products(const AttentionBackwardParams& params, void* stream) {
  const auto launch_shape = [&](auto type) -> const char* {
    using Shape = typename decltype(type)::type;
    const AttentionProblem& problem = params.problem;
    const int64_t blocks = num_tiles<Shape::kKeys>(problem, problem.num_keys) * problem.num_kv_heads;
    if (blocks > 0x7fffffff) return "the number of key tiles times heads must be below 2^31";
    if (blocks == 0) return nullptr;
    const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads), sizeof(typename Shape::Smem)};
    return launch(attention_backward_kernel<Shape>, shape, stream, params);
  };
  switch (attention_padded_head_dim(params.problem.head_dim)) {
    case 64:
      return launch_shape(TypeOf<BackwardShape<T, 64, 128, 64, 2, 8, 2, 2>>{});
    case 96:
      return with_first_that_fits<BackwardShape<T, 96, 128, 64, 2, 8, 2, 1>, BackwardShape<T, 96, 64, 64, 1, 8, 1, 1>>(
          launch_shape);
    case 128:
      return with_first_that_fits<BackwardShape<T, 128, 128, 64, 2, 8, 2, 2>,
                                  BackwardShape<T, 128, 64, 64, 1, 8, 1, 1>>(launch_shape);
    default:
      return with_first_that_fits<BackwardShape<T, 256, 64, 64, 2, 8, 2, 2>, BackwardShape<T, 256, 64, 32, 2, 8, 1, 1>,
                                  BackwardShape<T, 256, 32, 32, 1, 4, 1, 1>>(launch_shape);
  }
}

}  // namespace

const char* attention_backward_cuda(const AttentionBackwardParams& params, void* stream) {
  if (const char* error = refused(params.problem)) return error;
  if (params.dout.row_stride > 0x7fffffff) return "dout must have rows less than 2^31 elements apart";
  const char* error = launch_attention_row_terms(params, stream);
  if (error == nullptr) {
    error = dispatch_tensor_core_dtype(
        params.problem.dtype, [&](auto tag) { return launch_products<typename decltype(tag)::type>(params, stream); });
  }
  if (error == nullptr) error = launch_attention_query_gradient(params, stream);
  if (error != nullptr || params.dsink == nullptr) return error;
  return launch_attention_sink_gradient(params, stream);
}

}  // namespace arfast
