// Gradients of attention on the tensor cores of any GPU from sm_80 on (Dao 2023, arXiv 2307.08691, algorithm 2), by two
// kernels: one whose blocks have keys and walk over the queries that see them, one whose blocks have queries and walk
// over keys. Each sum has one owner that adds in a fixed order, so the bits are the same in every run; the price is
// that the scores and dp = dout v^T are computed twice, 7 products in place of 5.
#include "attention/attention_cuda.cuh"
#include "core/runtime.cuh"

namespace arfast {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = kWarps * 16;  // of a block: 16 for each warp

// Tiles of kRows rows that a block has and of kStep rows that it walks over, two of the latter: one is multiplied while
// the next one arrives.
template <typename Element, int kHeadDim_, int kStep_>
struct BackwardShape {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStep = kStep_;
  using Own = MatrixTile<T, kRows, kHeadDim>;
  using Walked = MatrixTile<T, kStep, kHeadDim>;
  using Scores = float[kStep / 8][4];
  using Weights = uint32_t[1][kStep / 16][4];
  using Gradient = float[1][kHeadDim / 8][4];
};

// What a score's gradient needs of its query.
struct RowTerms {
  float lse;    // in units of log 2; inf for a row that saw nothing: its weights are 0
  float delta;  // dout . out - dlse
};

// From a score and the gradient dp of its weight p to p and the gradient of the score before scale and softcap. Gives
// p dp.
struct ScoreGradient {
  float scale;  // from a score to an exponent of 2
  float cap, inner;

  __device__ explicit ScoreGradient(const AttentionProblem& problem) {
    const float softmax_scale = static_cast<float>(problem.softmax_scale);
    cap = static_cast<float>(problem.softcap);
    inner = cap > 0 ? softmax_scale / cap : 0.0f;
    scale = (cap > 0 ? cap : softmax_scale) * kLog2E;
  }
  __device__ float apply(const RowTerms& row, bool visible, float& score, float& dp) const {
    const float slope = cap > 0 ? tanh_approx(score * inner) : 0.0f;
    const float exponent = fmaf(cap > 0 ? slope : score, scale, -row.lse);
    const float p = visible ? ptx::exp2_approx(exponent) : 0.0f;
    // What is hidden has no gradient, even where dout or v is NaN.
    const float weighted = visible ? p * dp : 0.0f;
    dp = visible ? p * (dp - row.delta) * (1 - slope * slope) : 0.0f;
    score = p;
    return weighted;
  }
};

template <int kTiles, int kDepth, typename T>
__device__ void pack_weights(const float (&values)[2 * kDepth][4], uint32_t (&weights)[kTiles][kDepth][4]) {
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    fragment_from_accumulators<T>(weights[0][k], values[2 * k], values[2 * k + 1]);
  }
}

// The 16 rows of a warp, times `factor`, through the rows of `tile` that are its own.
template <typename Tile, typename T, int kColumns>
__device__ void write_gradient(Tile& tile, const float (&gradient)[1][kColumns][4], float factor,
                               const MatrixRows<T>& target, int first_row, int rows, int head_dim) {
  __syncwarp();  // all lanes have read their fragments of these rows
  tile.store_accumulators(first_row, 0, gradient[0], {factor, factor});
  __syncwarp();
  tile.write_rows(target.from(first_row), first_row, min(rows - first_row, 16), head_dim);
}

template <typename Shape>
struct KeySmem {
  typename Shape::Own k, v;
  typename Shape::Walked q[2], dout[2];
  RowTerms rows[2][Shape::kStep];
};

enum class Part {
  kBoth,
  kKeys,
  kValues
};  // the gradients of a launch: both need more registers than there are if D > 128

// dk and dv of a tile of keys, summed over the query heads that share them.
template <typename Shape, Part kPart>
__global__ void __launch_bounds__(kThreads) attention_key_gradient_kernel(AttentionBackwardParams params) {
  using T = typename Shape::T;
  constexpr int kStep = Shape::kStep;
  KeySmem<Shape>& smem = shared_storage<KeySmem<Shape>>();
  const AttentionProblem& problem = params.problem;
  const int kv_head = static_cast<int>(blockIdx.x % problem.num_kv_heads),
            head_dim = static_cast<int>(problem.head_dim);
  const SequenceTile tile = find_tile<kRows, true>(problem, blockIdx.x / problem.num_kv_heads);
  if (tile.num_rows <= 0) return;
  const KeyRange visible(problem, tile);
  const int group = static_cast<int>(problem.num_heads / problem.num_kv_heads);
  const TileRange range = visible.query_tiles(kStep, tile.first, tile.first + tile.num_rows - 1);
  const int steps = max(range.end - range.first, 0), iterations = steps * group;

  const auto load = [&](int iteration) {
    const int head = kv_head * group + iteration / steps, first = (range.first + iteration % steps) * kStep;
    const int stage = iteration % 2, left = tile.seqlen_q - first;
    smem.q[stage].template load<kThreads>(tile.queries<T>(problem.q, head).from(first), left, head_dim);
    smem.dout[stage].template load<kThreads>(tile.queries<T>(params.dout, head).from(first), left, head_dim);
    ptx::cp_async_commit();
    const RowTerms* rows = static_cast<const RowTerms*>(params.row_terms) + tile.statistic_index(problem, head) + first;
    for (int i = threadIdx.x; i < kStep; i += kThreads) {
      smem.rows[stage][i] = i < left ? rows[i] : RowTerms{INFINITY, 0};
    }
  };
  if (iterations > 0) {
    smem.k.template load<kThreads>(tile.keys<T>(problem.k, kv_head).from(tile.first), tile.num_rows, head_dim);
    smem.v.template load<kThreads>(tile.keys<T>(problem.v, kv_head).from(tile.first), tile.num_rows, head_dim);
    load(0);
  }
  const int lane = threadIdx.x % kWarpSize, first_row = static_cast<int>(threadIdx.x) / kWarpSize * 16;
  const uint32_t k_address = smem.k.a_address(first_row), v_address = smem.v.a_address(first_row);
  const ScoreGradient score_gradient(problem);
  typename Shape::Gradient dk = {}, dv = {};
  for (int iteration = 0; iteration < iterations; ++iteration) {
    const int stage = iteration % 2, first_query = (range.first + iteration % steps) * kStep;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step is there, and nobody reads the one before any more
    if (iteration + 1 < iterations) load(iteration + 1);
    // Rows of the accumulators are keys, columns queries.
    typename Shape::Scores scores, dp;
    multiply_rows<typename Shape::Own, typename Shape::Walked>(k_address, smem.q[stage].b_address(0), scores);
    if (kPart != Part::kValues) {
      multiply_rows<typename Shape::Own, typename Shape::Walked>(v_address, smem.dout[stage].b_address(0), dp);
    }
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i) {
      const int column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      const int key = tile.first + first_row + i % 4 / 2 * 8 + lane / 4;
      const bool sees = visible.sees(first_query + column, key);
      float ignored = 0;
      float& gradient = kPart == Part::kValues ? ignored : dp[i / 4][i % 4];
      score_gradient.apply(smem.rows[stage][column], sees, scores[i / 4][i % 4], gradient);
    }
    typename Shape::Weights weights;
    if (kPart != Part::kKeys) {
      pack_weights<1, kStep / 16, T>(scores, weights);
      multiply_columns<typename Shape::Walked>(weights, smem.dout[stage].transposed_b_address(0), dv);
    }
    if (kPart != Part::kValues) {
      pack_weights<1, kStep / 16, T>(dp, weights);
      multiply_columns<typename Shape::Walked>(weights, smem.q[stage].transposed_b_address(0), dk);
    }
  }
  const auto write = [&](auto& own, const auto& gradient, float factor, void* to) {
    const AttentionView view = dense_view(problem, to, problem.num_keys, problem.num_kv_heads);
    write_gradient(own, gradient, factor, tile.keys<T>(view, kv_head).from(tile.first), first_row, tile.num_rows,
                   head_dim);
  };
  if (kPart != Part::kKeys) write(smem.v, dv, 1.0f, params.dv);
  if (kPart != Part::kValues) write(smem.k, dk, static_cast<float>(problem.softmax_scale), params.dk);
}

// The gradient of the sink is a sum of p delta alone, without the differences that hide how out was rounded: for it
// delta becomes the sum of p dp.
__device__ void write_exact_deltas(const AttentionBackwardParams& params, const SequenceTile& tile, int head,
                                   int first_row, const float (&weighted)[2], const RowTerms (&rows)[2],
                                   RowTerms* row_terms) {
  const int lane = threadIdx.x % kWarpSize;
  const auto* dlse = static_cast<const float*>(params.dlse);
  __syncwarp();  // all lanes have read these rows' terms
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half + lane / 4;
    float delta = quad_sum(weighted[half]);
    if (lane % 4 != 0 || row >= tile.num_rows || rows[half].lse == INFINITY) continue;
    if (dlse != nullptr) delta -= dlse[tile.statistic_index(params.problem, head) + tile.first + row];
    row_terms[row].delta = delta;
  }
}

template <typename Shape>
struct QuerySmem {
  typename Shape::Own q, dout;
  typename Shape::Walked k[2], v[2];
};

// dq of a tile of queries.
template <typename Shape>
__global__ void __launch_bounds__(kThreads) attention_query_gradient_kernel(AttentionBackwardParams params) {
  using T = typename Shape::T;
  constexpr int kStep = Shape::kStep;
  QuerySmem<Shape>& smem = shared_storage<QuerySmem<Shape>>();
  const AttentionProblem& problem = params.problem;
  const int head = static_cast<int>(blockIdx.x % problem.num_heads), head_dim = static_cast<int>(problem.head_dim);
  const SequenceTile tile = find_tile<kRows, false>(problem, blockIdx.x / problem.num_heads);
  if (tile.num_rows <= 0) return;
  const int kv_head = head / static_cast<int>(problem.num_heads / problem.num_kv_heads);
  const MatrixRows<T> k = tile.keys<T>(problem.k, kv_head), v = tile.keys<T>(problem.v, kv_head);
  const KeyRange visible(problem, tile);
  const TileRange steps = visible.key_tiles(kStep, tile.first, tile.first + tile.num_rows - 1);

  const auto load = [&](int step) {
    const int left = tile.seqlen_k - step * kStep;
    smem.k[step % 2].template load<kThreads>(k.from(step * kStep), left, head_dim);
    smem.v[step % 2].template load<kThreads>(v.from(step * kStep), left, head_dim);
    ptx::cp_async_commit();
  };
  if (steps.first < steps.end) {
    smem.q.template load<kThreads>(tile.queries<T>(problem.q, head).from(tile.first), tile.num_rows, head_dim);
    smem.dout.template load<kThreads>(tile.queries<T>(params.dout, head).from(tile.first), tile.num_rows, head_dim);
    load(steps.first);
  }
  const int lane = threadIdx.x % kWarpSize, first_row = static_cast<int>(threadIdx.x) / kWarpSize * 16;
  const uint32_t q_address = smem.q.a_address(first_row), dout_address = smem.dout.a_address(first_row);
  const ScoreGradient score_gradient(problem);
  RowTerms* const row_terms =
      static_cast<RowTerms*>(params.row_terms) + tile.statistic_index(problem, head) + tile.first;
  RowTerms rows[2];
  float weighted[2] = {};  // sums of p dp
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half + lane / 4;
    rows[half] = row < tile.num_rows ? row_terms[row] : RowTerms{INFINITY, 0};
  }
  typename Shape::Gradient dq = {};
  for (int step = steps.first; step < steps.end; ++step) {
    const int stage = step % 2;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step is there, and nobody reads the one before any more
    if (step + 1 < steps.end) load(step + 1);
    typename Shape::Scores scores, dp;
    multiply_rows<typename Shape::Own, typename Shape::Walked>(q_address, smem.k[stage].b_address(0), scores);
    multiply_rows<typename Shape::Own, typename Shape::Walked>(dout_address, smem.v[stage].b_address(0), dp);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = tile.first + first_row + 8 * half + lane / 4;
      const int first = visible.begin(query) - step * kStep, end = visible.end(query) - step * kStep;
#pragma unroll
      for (int i = 0; i < kStep / 4; ++i) {
        const int column = i / 2 * 8 + 2 * (lane % 4) + i % 2, j = 2 * half + i % 2;
        const bool sees = column >= first && column < end;
        weighted[half] += score_gradient.apply(rows[half], sees, scores[i / 2][j], dp[i / 2][j]);
      }
    }
    typename Shape::Weights weights;
    pack_weights<1, kStep / 16, T>(dp, weights);
    multiply_columns<typename Shape::Walked>(weights, smem.k[stage].transposed_b_address(0), dq);
  }
  if (params.dsink != nullptr) write_exact_deltas(params, tile, head, first_row, weighted, rows, row_terms);
  const AttentionView view = dense_view(problem, params.dq, problem.num_queries, problem.num_heads);
  write_gradient(smem.q, dq, static_cast<float>(problem.softmax_scale), tile.queries<T>(view, head).from(tile.first),
                 first_row, tile.num_rows, head_dim);
}

// The terms of every query and head, one warp for each.
template <typename T>
__global__ void __launch_bounds__(kThreads) attention_row_terms_kernel(AttentionBackwardParams params) {
  const AttentionProblem& problem = params.problem;
  const int64_t index = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;  // in [B, H, T] or [H, N]
  const bool packed = problem.cu_seqlens_q != nullptr;
  if (index >= (packed ? 1 : problem.batch) * problem.num_heads * problem.num_queries) return;
  const int64_t row = index % problem.num_queries, head = index / problem.num_queries % problem.num_heads;
  const int64_t batch = index / (problem.num_queries * problem.num_heads);
  const auto at = [&](const AttentionView& view) {
    return static_cast<const T*>(view.data) + batch * view.batch_stride + row * view.row_stride +
           head * view.head_stride;
  };
  const T *out = at(params.out), *dout = at(params.dout);
  float delta = 0;
  for (int i = threadIdx.x % kWarpSize; i < problem.head_dim; i += kWarpSize) {
    delta += to_float(out[i]) * to_float(dout[i]);
  }
  delta = warp_sum(delta);
  if (threadIdx.x % kWarpSize != 0) return;
  const float lse = static_cast<const float*>(params.lse)[index];
  if (params.dlse != nullptr) delta -= static_cast<const float*>(params.dlse)[index];
  static_cast<RowTerms*>(params.row_terms)[index] =
      lse == -INFINITY ? RowTerms{INFINITY, 0} : RowTerms{lse * kLog2E, delta};
}

struct SinkSmem {
  float scratch[kWarps];
};

// dsink of one head: - sum over all rows of exp(sink - lse) delta.
__global__ void __launch_bounds__(kThreads) attention_sink_gradient_kernel(AttentionBackwardParams params) {
  SinkSmem& smem = shared_storage<SinkSmem>();
  const AttentionProblem& problem = params.problem;
  const int64_t head = blockIdx.x, batches = problem.cu_seqlens_q != nullptr ? 1 : problem.batch;
  const float sink = static_cast<const float*>(problem.sink)[head] * kLog2E;
  float sum = 0;
  for (int64_t batch = 0; batch < batches; ++batch) {
    const RowTerms* rows =
        static_cast<const RowTerms*>(params.row_terms) + (batch * problem.num_heads + head) * problem.num_queries;
    for (int64_t i = threadIdx.x; i < problem.num_queries; i += kThreads) {
      sum -= ptx::exp2_approx(sink - rows[i].lse) * rows[i].delta;
    }
  }
  sum = block_sum<kThreads>(sum, smem.scratch);
  if (threadIdx.x == 0) static_cast<float*>(params.dsink)[head] = sum;
}

template <typename Smem, typename Kernel>
const char* launch_tiles(Kernel* kernel, int64_t tiles, int64_t heads, const AttentionBackwardParams& params,
                         void* stream) {
  if (tiles * heads > 0x7fffffff) return "the number of tiles times heads must be below 2^31";
  if (tiles == 0) return nullptr;
  const LaunchShape shape{dim3(static_cast<unsigned>(tiles * heads)), dim3(kThreads), sizeof(Smem)};
  return launch(kernel, shape, stream, params);
}

template <typename Shape, Part kPart>
const char* launch_keys(const AttentionBackwardParams& params, void* stream) {
  const AttentionProblem& problem = params.problem;
  return launch_tiles<KeySmem<Shape>>(attention_key_gradient_kernel<Shape, kPart>,
                                      num_tiles<kRows>(problem, problem.num_keys), problem.num_kv_heads, params,
                                      stream);
}

template <typename Shape>
const char* launch_shape(const AttentionBackwardParams& params, void* stream) {
  const AttentionProblem& problem = params.problem;
  const char* error = nullptr;
  if constexpr (Shape::kHeadDim <= 128) {
    error = launch_keys<Shape, Part::kBoth>(params, stream);
  } else {
    error = launch_keys<Shape, Part::kKeys>(params, stream);
    if (error == nullptr) error = launch_keys<Shape, Part::kValues>(params, stream);
  }
  if (error != nullptr) return error;
  return launch_tiles<QuerySmem<Shape>>(attention_query_gradient_kernel<Shape>,
                                        num_tiles<kRows>(problem, problem.num_queries), problem.num_heads, params,
                                        stream);
}

template <typename T>
const char* launch_gradients(const AttentionBackwardParams& params, void* stream) {
  const int64_t head_dim = params.problem.head_dim;
  if (head_dim <= 64) return launch_shape<BackwardShape<T, 64, 64>>(params, stream);
  if (head_dim <= 96) return launch_shape<BackwardShape<T, 96, 32>>(params, stream);
  if (head_dim <= 128) return launch_shape<BackwardShape<T, 128, 32>>(params, stream);
  return launch_shape<BackwardShape<T, 256, 32>>(params, stream);
}

template <typename T>
const char* launch_backward(const AttentionBackwardParams& params, void* stream) {
  const AttentionProblem& problem = params.problem;
  const int64_t batches = problem.cu_seqlens_q != nullptr ? 1 : problem.batch;
  const int64_t blocks = (batches * problem.num_heads * problem.num_queries + kWarps - 1) / kWarps;
  if (blocks > 0x7fffffff) return "the number of rows times heads must be below 2^33";
  const char* error = nullptr;
  if (blocks > 0) {
    const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads)};
    error = launch(attention_row_terms_kernel<T>, shape, stream, params);
  }
  if (error == nullptr) error = launch_gradients<T>(params, stream);
  if (error != nullptr || params.dsink == nullptr) return error;
  const LaunchShape shape{dim3(static_cast<unsigned>(problem.num_heads)), dim3(kThreads), sizeof(SinkSmem)};
  return launch(attention_sink_gradient_kernel, shape, stream, params);
}

}  // namespace

const char* attention_backward_cuda(const AttentionBackwardParams& params, void* stream) {
  if (const char* error = refused(params.problem)) return error;
  if (params.dout.row_stride > 0x7fffffff) return "dout must have rows less than 2^31 elements apart";
  return dispatch_tensor_core_dtype(
      params.problem.dtype, [&](auto tag) { return launch_backward<typename decltype(tag)::type>(params, stream); });
}

}  // namespace arfast
