// Floats as integers in the same order, so that a value and an index fit one comparison.
#pragma once

#include <cstdint>

#include "core/vector.cuh"

namespace arfast {

// Larger for larger floats; -0 counts as 0. NaN is larger than infinity: callers keep it out.
__device__ inline uint32_t order_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ inline float from_order(uint32_t order) {
  return __uint_as_float(order ^ (order >> 31 ? 0x80000000u : 0xffffffffu));
}

// The larger value first, then the smaller index. 0 is smaller than every candidate's key.
__device__ inline uint64_t candidate_key(float value, uint32_t index) {
  return uint64_t{order_of(value)} << 32 | (0xffffffffu - index);
}
__device__ inline float key_value(uint64_t key) { return from_order(static_cast<uint32_t>(key >> 32)); }
__device__ inline uint32_t key_index(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

}  // namespace arfast
