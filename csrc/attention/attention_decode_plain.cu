// Decoding attention of few query rows per key-value head, whose arithmetic hides behind the reading of the cache. A
// group of lanes shares a key: each lane has some chunks of 16 bytes of it, and the same columns of the queries and the
// outputs. The groups of a block take different keys and are merged at the end. Keys and values come through a ring in
// shared memory in which every thread reads only what it has copied itself: no step waits for another thread.
#include "attention/attention_decode_cuda.cuh"

namespace arfast {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 3;  // of 16 KiB: while one is computed two arrive, of three blocks 96 KiB

template <typename Element, int kHeadDim_, int kRows_>
struct PlainShape {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kLanes = kHeadDim <= 128 ? 8 : 16;  // of a group: the fewer, the fewer sums across lanes
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kElements = Vector16<T>::kSize;           // of a chunk of 16 bytes
  static constexpr int kChunks = kHeadDim / kLanes / kElements;  // of a lane
  static constexpr int kKeys = kChunks < 4 ? 4 / kChunks : 1;    // of a group in a step

  using Stage = uint4[kKeys][kChunks][kThreads];
  struct Ring {
    Stage k[kStages], v[kStages];
  };
  union Smem {
    Ring ring;
    SoftmaxParts<kGroups, kRows, kHeadDim> parts;  // after the last step
  };
};

// Starts to copy the first `elements` elements of a chunk, zeros after them. All but the last one of a row are whole.
template <typename T>
__device__ void copy_chunk(uint4* to, const T* from, int elements) {
  if (elements == Vector16<T>::kSize && is_aligned16(from)) {
    ptx::cp_async16(ptx::shared_address(to), from);
  } else {
    *to = to_bits(first_elements(from, elements));
  }
}

template <typename T>
__device__ float capped(float score, float cap, float inner) {
  return cap * (std::is_same_v<T, float> ? tanhf(score * inner) : tanh_approx(score * inner));
}

// What a lane keeps of the rows of its group.
template <typename Shape>
struct LaneState {
  using T = typename Shape::T;
  static constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kChunks = Shape::kChunks,
                       kElements = Shape::kElements;
  float q[kRows][kChunks][kElements];
  float output[kRows][kChunks][kElements] = {};
  float max[kRows], sum[kRows] = {};

  __device__ static int column(int chunk) {
    return (static_cast<int>(threadIdx.x) % Shape::kLanes + chunk * Shape::kLanes) * kElements;
  }

  __device__ LaneState(const AttentionDecodeParams& params, const DecodeBlock& block) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const bool there = block.first_row + row < block.rows.count;
      const T* query = block.query<T>(params, there ? row : 0);
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const auto chunk = first_elements(query + column(j), static_cast<int>(params.head_dim) - column(j));
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
      for (int j = 0; j < kChunks; ++j) {
        const auto chunk = from_bits<T>(keys[key][j][threadIdx.x]);
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
    for (int i = 0; i < kChunks * kElements; ++i) output[row][i / kElements][i % kElements] *= factor;
  }

  __device__ void add(const typename Shape::Stage& values, const float (&weights)[kRows][kKeys]) {
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const auto chunk = from_bits<T>(values[key][j][threadIdx.x]);
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

// Zeros in the chunks past the head dimension, which nothing is copied to.
template <typename Shape>
__device__ void clear_unused(typename Shape::Ring& ring, int head_dim) {
#pragma unroll
  for (int j = 0; j < Shape::kChunks; ++j) {
    if (LaneState<Shape>::column(j) < head_dim) continue;
    for (int i = 0; i < kStages * Shape::kKeys; ++i) {
      ring.k[i / Shape::kKeys][i % Shape::kKeys][j][threadIdx.x] = uint4{};
      ring.v[i / Shape::kKeys][i % Shape::kKeys][j][threadIdx.x] = uint4{};
    }
  }
}

template <typename Shape>
__global__ void __launch_bounds__(kThreads, Shape::kRows < 3 ? 3 : 2)
    attention_decode_plain_kernel(AttentionDecodeParams params) {
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
      const int stage = step % kStages;
      const int key = key_at(step, i);
      const CacheRow row(params, block.sequence, min(key, block.end - 1));
      const T *k = row.of<T>(params.k, block.kv_head), *v = row.of<T>(params.v, block.kv_head);
#pragma unroll
      for (int j = 0; j < Shape::kChunks; ++j) {
        const int first = State::column(j);
        if (first >= head_dim) continue;
        // Zeros past the end: weights of 0 do not protect from infinities.
        const int elements = key < block.end ? min(head_dim - first, Shape::kElements) : 0;
        copy_chunk(&smem.ring.k[stage][i][j][threadIdx.x], k + first, elements);
        copy_chunk(&smem.ring.v[stage][i][j][threadIdx.x], v + first, elements);
      }
    }
    ptx::cp_async_commit();
  };
  clear_unused<Shape>(smem.ring, head_dim);
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);

  State state(params, block);
  int position[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) position[row] = block.position(params, row);
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
        if (!block.sees(position[row], key_at(step, i))) scores[row][i] = -INFINITY;
      }
      state.update(row, scale, scores[row]);
    }
    state.add(smem.ring.v[step % kStages], scores);
  }
  __syncthreads();  // nobody reads keys and values any more
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int j = 0; j < Shape::kChunks; ++j) {
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

// As many rows at a time as there are, 3 at most.
template <typename T, int kHeadDim>
const char* launch_rows(const AttentionDecodeParams& params, void* stream) {
  const int64_t rows = params.num_queries * params.num_heads / params.num_kv_heads;
  if (rows == 1) return launch_shape<PlainShape<T, kHeadDim, 1>>(params, stream);
  if (rows == 2) return launch_shape<PlainShape<T, kHeadDim, 2>>(params, stream);
  return launch_shape<PlainShape<T, kHeadDim, 3>>(params, stream);
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
