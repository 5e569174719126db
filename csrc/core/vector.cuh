// Elements and 16-byte vectors of them on the GPU. Arithmetic happens in float, as on the CPU (simd.h).
#pragma once

#if defined(ARFAST_EMULATED)
#include "emulator/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

#include "core/dtype.h"

namespace arfast {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline Float16 from_float<Float16>(float x) {
  return Float16{__half_as_ushort(__float2half_rn(x))};
}

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// As many elements as one 16-byte access moves.
template <typename T>
struct alignas(16) Vector16 {
  static constexpr int kSize = 16 / sizeof(T);
  T elements[kSize];
};

// Vectors that hold `size` elements.
template <typename T>
__host__ __device__ inline int64_t vectors_of(int64_t size) {
  return (size + Vector16<T>::kSize - 1) / Vector16<T>::kSize;
}

template <typename T>
__device__ inline Vector16<T> filled_with(float value) {
  Vector16<T> vector;
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) vector.elements[i] = from_float<T>(value);
  return vector;
}

// The first `count` elements at `from`, aligned or not, then zeros.
template <typename T>
__device__ inline Vector16<T> first_elements(const T* from, int count) {
  Vector16<T> vector = filled_with<T>(0.0f);
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) {
    if (i < count) vector.elements[i] = from[i];
  }
  return vector;
}

// A vector as the load instruction leaves it. What waits in registers waits like this: two elements of 16 bits share a
// register, and no thread waits for the memory before it takes elements out.
template <typename T>
__device__ inline uint4 to_bits(const Vector16<T>& vector) {
  return reinterpret_cast<const uint4&>(vector);
}
template <typename T>
__device__ inline Vector16<T> from_bits(const uint4& bits) {
  return reinterpret_cast<const Vector16<T>&>(bits);
}

template <typename T>
__host__ __device__ inline bool is_aligned16(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

}  // namespace arfast
