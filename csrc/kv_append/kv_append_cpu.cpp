// Appending to a key-value cache with rotary position embedding on the CPU: threads over tokens.
#include <cstring>

#include "core/parallel.h"
#include "core/rotation.h"
#include "kv_append/kv_append.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

template <typename T>
T* head_of(const HeadsView& view, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(view.data) + batch * view.batch_stride + row * view.row_stride + head * view.head_stride;
}

template <typename T>
void append_token(const KVAppendParams& params, int64_t index) {
  const int64_t sequence = index / params.num_tokens, token = index % params.num_tokens, size = params.head_dim;
  const int64_t half = size / 2, angle = index % params.table_rows * half;
  const float *cos = params.cos + angle, *sin = params.sin + angle;
  for (int64_t head = 0; head < params.num_heads; ++head) {
    T* out = static_cast<T*>(params.out) + (index * params.num_heads + head) * size;
    rotate_head(head_of<const T>(params.q, sequence, token, head), cos, sin, half, false, out);
  }
  const KVSlot slot = slot_of(params, sequence, token);
  for (int64_t head = 0; head < params.num_kv_heads; ++head) {
    rotate_head(head_of<const T>(params.k, sequence, token, head), cos, sin, half, false,
                head_of<T>(params.k_cache, slot.batch, slot.row, head));
    std::memcpy(head_of<T>(params.v_cache, slot.batch, slot.row, head),
                head_of<const T>(params.v, sequence, token, head), static_cast<size_t>(size) * sizeof(T));
  }
}

}  // namespace

void kv_append(const KVAppendParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t elements = (params.num_heads + 2 * params.num_kv_heads) * params.head_dim;
    parallel_for(params.batch * params.num_tokens, grain_for(elements), [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) append_token<T>(params, index);
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
