// The 16-bit floats of cuda_fp16.h and cuda_bf16.h, as far as kernels use them: storage and conversions.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace emulator {

// Round to nearest even; every NaN becomes the canonical one, as on the GPU.
inline __attribute__((always_inline)) uint16_t bf16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>(x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline __attribute__((always_inline)) uint16_t f16_bits(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &half, sizeof(bits));
  return x != x ? uint16_t{0x7fff} : bits;
}
inline __attribute__((always_inline)) float bf16_value(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  memcpy(&x, &wide, sizeof(x));
  return x;
}
inline __attribute__((always_inline)) float f16_value(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, sizeof(half));
  return static_cast<float>(half);
}

}  // namespace emulator

inline __attribute__((always_inline)) __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline __attribute__((always_inline)) uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __attribute__((always_inline)) float __half2float(__half x) { return emulator::f16_value(x.bits); }
inline __attribute__((always_inline)) __half __float2half_rn(float x) { return {emulator::f16_bits(x)}; }
inline __attribute__((always_inline)) __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline __attribute__((always_inline)) uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __attribute__((always_inline)) float __bfloat162float(__nv_bfloat16 x) { return emulator::bf16_value(x.bits); }
inline __attribute__((always_inline)) __nv_bfloat16 __float2bfloat16_rn(float x) { return {emulator::bf16_bits(x)}; }
