// Appending to a key-value cache with rotary position embedding on the GPU (Su et al. 2021, arXiv 2104.09864, equation
// 34): a thread for each vector of pairs of a head of q, k or v.
//
// A decode step moves a few kilobytes here: what it costs is the launch, of which there would be four (the rotations of
// q and k, the copies of k and v).
#include "core/rotation.cuh"
#include "core/rows.cuh"
#include "core/runtime.cuh"
#include "kv_append/kv_append.h"

namespace arfast {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ T* head_of(const HeadsView& view, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(view.data) + batch * view.batch_stride + row * view.row_stride + head * view.head_stride;
}

// Grid: (tokens of all sequences, blocks of vectors of a token).
template <typename T>
__global__ void __launch_bounds__(kThreads) kv_append_kernel(KVAppendParams params) {
  constexpr int kSize = Vector16<T>::kSize;
  const int num_heads = static_cast<int>(params.num_heads), num_kv_heads = static_cast<int>(params.num_kv_heads);
  const int half = static_cast<int>(params.head_dim / 2), vectors = (half + kSize - 1) / kSize;
  const int vector = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  const int head = vector / vectors, column = vector % vectors * kSize;
  if (head >= num_heads + 2 * num_kv_heads) return;
  const int64_t index = blockIdx.x, sequence = index / params.num_tokens, token = index % params.num_tokens;

  const bool is_query = head < num_heads, is_value = head >= num_heads + num_kv_heads;
  const T* x;
  T* out;
  if (is_query) {
    x = head_of<const T>(params.q, sequence, token, head);
    out = static_cast<T*>(params.out) + (index * num_heads + head) * params.head_dim;
  } else {
    const KVSlot slot = slot_of(params, sequence, token);
    if (slot.batch < 0) return;
    const int kv_head = head - num_heads - (is_value ? num_kv_heads : 0);
    x = head_of<const T>(is_value ? params.v : params.k, sequence, token, kv_head);
    out = head_of<T>(is_value ? params.v_cache : params.k_cache, slot.batch, slot.row, kv_head);
  }
  Vector16<T> first = from_bits<T>(RowOf<const T>(x, half).bits_at(column, 0));
  Vector16<T> second = from_bits<T>(RowOf<const T>(x + half, half).bits_at(column, 0));
  if (!is_value) {
    const int64_t angles = index % params.table_rows;
    float cos[kSize], sin[kSize];
    load_floats(row_of<const float>(params.cos, angles, half, half), column, cos);
    load_floats(row_of<const float>(params.sin, angles, half, half), column, sin);
    rotate(first, second, cos, sin);
  }
  RowOf<T>(out, half).store_cached(column, first);
  RowOf<T>(out + half, half).store_cached(column, second);
}

}  // namespace

const char* kv_append_cuda(const KVAppendParams& params, void* stream) {
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t tokens = params.batch * params.num_tokens, heads = params.num_heads + 2 * params.num_kv_heads;
    const int64_t blocks = (heads * vectors_of<T>(params.head_dim / 2) + kThreads - 1) / kThreads;
    if (tokens > 0x7fffffff || blocks > 0xffff) return "q must have fewer than 2^31 tokens of fewer than 2^24 vectors";
    const LaunchShape shape{dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(blocks)), dim3(kThreads)};
    return launch(kv_append_kernel<T>, shape, stream, params);
  });
}

}  // namespace arfast
