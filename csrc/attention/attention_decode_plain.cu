// Decoding attention of few query rows per key-value head, whose arithmetic hides behind the reading of the cache. A
// group of lanes shares a key: each lane has 16 bytes of it, of the queries and of the outputs. The groups of a block
// take different keys and are merged at the end. Keys and values come through a ring in shared memory in which every
// thread reads only what it has copied itself: no step waits for another thread.
#include "attention/attention_decode_cuda.cuh"
#include "core/rows.cuh"

namespace arfast {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 3;  // steps of 16 KiB: one is computed while two arrive, 32 KiB of a block at any time

template <typename Element, int kHeadDim_, int kRows_>
struct PlainShape {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kElements = Vector16<T>::kSize;
  static constexpr int kChunks = kHeadDim / kElements;  // 16-byte chunks of a key
  static constexpr int kLanes = kChunks < kWarpSize ? kChunks : kWarpSize;
  static constexpr int kVectors = kChunks / kLanes;  // chunks of a lane
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kKeys = 4 / kVectors;  // of a group in a step

  using Stage = Vector16<T>[kKeys][kVectors][kThreads];
  struct Ring {
    Stage k[kStages], v[kStages];
  };
  union Smem {
    Ring ring;
    SoftmaxParts<kGroups, kRows, kHeadDim> parts;  // after the last step
  };
};

// Starts to copy the chunk that begins in column `first` of a row of `columns` elements, zeros beside them.
template <typename T>
__device__ void copy_chunk(Vector16<T>* to, const T* row, int first, int columns) {
  if (is_aligned16(row + first)) {
    const int elements = max(0, min(columns - first, Vector16<T>::kSize));
    const T* from = elements > 0 ? row + first : row;
    ptx::cp_async16(ptx::shared_address(to), from, elements * static_cast<int>(sizeof(T)));
  } else {
    *to = RowOf<const T>(row, columns).at(first, 0);
  }
}

template <typename T>
__device__ float capped(float score, float cap, float inner) {
  return cap * (std::is_same_v<T, float> ? tanhf(score * inner) : tanh_approx(score * inner));
}

// What a lane keeps of the rows of its group.
template <typename Shape>
struct LaneState {
  static constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kVectors = Shape::kVectors,
                       kElements = Shape::kElements;
  float q[kRows][kVectors][kElements];
  float output[kRows][kVectors][kElements] = {};
  float max[kRows], sum[kRows] = {};

  __device__ static int column(int vector) {
    return (static_cast<int>(threadIdx.x) % Shape::kLanes + vector * Shape::kLanes) * kElements;
  }

  __device__ LaneState(const AttentionDecodeParams& params, const DecodeBlock& block) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const bool there = block.first_row + row < block.rows.count;
      const RowOf<const typename Shape::T> query(block.query<typename Shape::T>(params, there ? row : 0),
                                                 params.head_dim);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const auto chunk = query.at(column(j), 0);
#pragma unroll
        for (int i = 0; i < kElements; ++i) q[row][j][i] = to_float(chunk.elements[i]);
      }
      max[row] = -INFINITY;
    }
  }

  // The scores of the group's keys of a step, in every lane.
  __device__ void multiply(const typename Shape::Stage& keys, float (&scores)[kRows][kKeys]) const {
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) scores[row][key] = 0;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const auto chunk = keys[key][j][threadIdx.x];
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const float element = to_float(chunk.elements[i]);
#pragma unroll
          for (int row = 0; row < kRows; ++row) scores[row][key] = fmaf(q[row][j][i], element, scores[row][key]);
        }
      }
    }
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) scores[row][key] = warp_sum<Shape::kLanes>(scores[row][key]);
    }
  }

  // Turns a row's scores into weights.
  __device__ void update(int row, float scale, float (&scores)[kKeys]) {
    float top = max[row];
#pragma unroll
    for (int key = 0; key < kKeys; ++key) top = fmaxf(top, scores[key]);
    const float shift = top == -INFINITY ? 0.0f : top;  // nothing seen yet: -inf - -inf would be NaN
    const float factor = ptx::exp2_approx((max[row] - shift) * scale);
    max[row] = top;
    sum[row] *= factor;
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      scores[key] = ptx::exp2_approx((scores[key] - shift) * scale);
      sum[row] += scores[key];
    }
#pragma unroll
    for (int i = 0; i < kVectors * kElements; ++i) output[row][i / kElements][i % kElements] *= factor;
  }

  __device__ void add(const typename Shape::Stage& values, const float (&weights)[kRows][kKeys]) {
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const auto chunk = values[key][j][threadIdx.x];
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const float element = to_float(chunk.elements[i]);
#pragma unroll
          for (int row = 0; row < kRows; ++row) {
            output[row][j][i] = fmaf(weights[row][key], element, output[row][j][i]);
          }
        }
      }
    }
  }
};

template <typename Shape>
__global__ void __launch_bounds__(kThreads, 3) attention_decode_plain_kernel(AttentionDecodeParams params) {
  using T = typename Shape::T;
  using State = LaneState<Shape>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kGroups = Shape::kGroups;
  auto& smem = shared_storage<typename Shape::Smem>();
  ptx::grid_dependency_launch();
  const DecodeBlock block = DecodeBlock::find<kRows>(params, blockIdx.x);
  if (!block.exists) return;
  const int head_dim = static_cast<int>(params.head_dim), group = static_cast<int>(threadIdx.x) / Shape::kLanes;
  const int steps = (block.end - block.begin + kKeys * kGroups - 1) / (kKeys * kGroups);

  const auto key_at = [&](int step, int i) { return block.begin + (step * kKeys + i) * kGroups + group; };
  const auto load = [&](int step) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (step >= steps) break;
      const int key = key_at(step, i), columns = key < block.end ? head_dim : 0;
      const CacheRow row(params, block.sequence, min(key, block.end - 1));
      const T *k = row.of<T>(params.k, block.kv_head), *v = row.of<T>(params.v, block.kv_head);
#pragma unroll
      for (int j = 0; j < Shape::kVectors; ++j) {
        copy_chunk(&smem.ring.k[step % kStages][i][j][threadIdx.x], k, State::column(j), columns);
        copy_chunk(&smem.ring.v[step % kStages][i][j][threadIdx.x], v, State::column(j), columns);
      }
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);

  State state(params, block);
  int first_key[kRows], end_key[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    first_key[row] = block.first_key(params, row);
    end_key[row] = block.end_key(params, row);
  }
  const float scale = score_scale(params), cap = static_cast<float>(params.softcap);
  const float inner = static_cast<float>(params.softmax_scale / params.softcap);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    load(step + kStages - 1);  // where this thread has read the step before
    float scores[kRows][kKeys];
    state.multiply(smem.ring.k[step % kStages], scores);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (cap > 0) scores[row][i] = capped<T>(scores[row][i], cap, inner);
        if (key_at(step, i) < first_key[row] || key_at(step, i) >= end_key[row]) scores[row][i] = -INFINITY;
      }
      state.update(row, scale, scores[row]);
    }
    state.add(smem.ring.v[step % kStages], scores);
  }
  __syncthreads();  // nobody reads keys and values any more
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int j = 0; j < Shape::kVectors; ++j) {
#pragma unroll
      for (int i = 0; i < Shape::kElements; ++i) {
        smem.parts.sums[group][row][State::column(j) + i] = state.output[row][j][i];
      }
    }
    if (threadIdx.x % Shape::kLanes == 0) {
      smem.parts.max[group][row] = state.max[row];
      smem.parts.sum[group][row] = state.sum[row];
    }
  }
  __syncthreads();
  write_rows<T, kThreads>(params, block, smem.parts);
}

template <typename Shape>
const char* launch_shape(const AttentionDecodeParams& params, void* stream) {
  return launch_ranges<Shape::kRows, typename Shape::Smem>(attention_decode_plain_kernel<Shape>, kThreads, params,
                                                           stream);
}

// As many rows at a time as there are, 4 at most.
template <typename T, int kHeadDim>
const char* launch_rows(const AttentionDecodeParams& params, void* stream) {
  const int64_t rows = params.num_queries * params.num_heads / params.num_kv_heads;
  if (rows == 1) return launch_shape<PlainShape<T, kHeadDim, 1>>(params, stream);
  if (rows == 2) return launch_shape<PlainShape<T, kHeadDim, 2>>(params, stream);
  return launch_shape<PlainShape<T, kHeadDim, 4>>(params, stream);
}

}  // namespace

const char* launch_decode_plain(const AttentionDecodeParams& params, void* stream) {
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.head_dim <= 64) return launch_rows<T, 64>(params, stream);
    if (params.head_dim <= 128) return launch_rows<T, 128>(params, stream);
    return launch_rows<T, 256>(params, stream);
  });
}

}  // namespace arfast
