// CUDA as kernel sources see it when a host compiler builds them for the emulator: the few built-in names that our
// kernels use. What only the runtime can do is in calls.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/calls.h"
#include "emulator/half.h"
#include "emulator/types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_shape())
#define gridDim (emulator::grid_shape())
constexpr int warpSize = 32;

namespace emulator {

// As the bits of a 64-bit word, which is how values travel between lanes.
template <typename T>
__forceinline__ uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  return word;
}
template <typename T>
__forceinline__ T from_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

template <typename T>
constexpr AtomicType atomic_type() {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                    std::is_same_v<T, unsigned long long>,
                "atomic operations take int, unsigned, unsigned long long or float");
  if constexpr (std::is_same_v<T, float>) return AtomicType::kFloat32;
  if constexpr (std::is_same_v<T, int>) return AtomicType::kSigned32;
  if constexpr (std::is_same_v<T, unsigned long long>) return AtomicType::kUnsigned64;
  return AtomicType::kUnsigned32;
}
template <typename T>
__forceinline__ T atomic(AtomicOp op, T* address, T operand, T compare = T()) {
  return from_word<T>(atomic(op, atomic_type<T>(), address, to_word(operand), to_word(compare)));
}

}  // namespace emulator

__forceinline__ void __syncthreads() { emulator::barrier_sync_all(); }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::warp(emulator::WarpOp::kSync, mask, 0, 0, 32);
}
__forceinline__ unsigned __activemask() { return emulator::active_lanes(); }
__forceinline__ void __threadfence() { emulator::thread_fence(); }
__forceinline__ void __threadfence_block() { emulator::thread_fence(); }

#define EMULATOR_SHUFFLE(name, op)                                                              \
  template <typename T>                                                                         \
  __forceinline__ T name(unsigned mask, T value, int argument, int width = 32) {                \
    return emulator::from_word<T>(                                                              \
        emulator::warp(emulator::WarpOp::op, mask, emulator::to_word(value), argument, width)); \
  }
EMULATOR_SHUFFLE(__shfl_sync, kShuffle)
EMULATOR_SHUFFLE(__shfl_xor_sync, kShuffleXor)
EMULATOR_SHUFFLE(__shfl_up_sync, kShuffleUp)
EMULATOR_SHUFFLE(__shfl_down_sync, kShuffleDown)
#undef EMULATOR_SHUFFLE

__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emulator::warp(emulator::WarpOp::kBallot, mask, predicate != 0, 0, 32));
}
__forceinline__ int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
__forceinline__ int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <typename T>
__forceinline__ unsigned __match_any_sync(unsigned mask, T value) {
  return static_cast<unsigned>(emulator::warp(emulator::WarpOp::kMatch, mask, emulator::to_word(value), 0, 32));
}

#define EMULATOR_REDUCE(name, type, op)                                                                        \
  __forceinline__ type name(unsigned mask, type value) {                                                       \
    return static_cast<type>(emulator::warp(emulator::WarpOp::op, mask, static_cast<unsigned>(value), 0, 32)); \
  }
EMULATOR_REDUCE(__reduce_add_sync, unsigned, kAdd)
EMULATOR_REDUCE(__reduce_add_sync, int, kAdd)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, kMin)
EMULATOR_REDUCE(__reduce_min_sync, int, kSignedMin)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, kMax)
EMULATOR_REDUCE(__reduce_max_sync, int, kSignedMax)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, kAnd)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, kOr)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef EMULATOR_REDUCE

#define EMULATOR_ATOMIC(name, op)                                       \
  template <typename T>                                                 \
  __forceinline__ T name(T* address, std::type_identity_t<T> value) {   \
    return emulator::atomic<T>(emulator::AtomicOp::op, address, value); \
  }
EMULATOR_ATOMIC(atomicAdd, kAdd)
EMULATOR_ATOMIC(atomicMin, kMin)
EMULATOR_ATOMIC(atomicMax, kMax)
EMULATOR_ATOMIC(atomicAnd, kAnd)
EMULATOR_ATOMIC(atomicOr, kOr)
EMULATOR_ATOMIC(atomicXor, kXor)
EMULATOR_ATOMIC(atomicExch, kExchange)
#undef EMULATOR_ATOMIC
template <typename T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return emulator::atomic<T>(emulator::AtomicOp::kCompareExchange, address, value, compare);
}

template <typename T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}
[[noreturn]] __forceinline__ void __trap() { emulator::trap(); }

__forceinline__ float __uint_as_float(unsigned x) { return emulator::from_word<float>(x); }
__forceinline__ float __int_as_float(int x) { return emulator::from_word<float>(static_cast<unsigned>(x)); }
__forceinline__ unsigned __float_as_uint(float x) { return emulator::from_word<unsigned>(emulator::to_word(x)); }
__forceinline__ int __float_as_int(float x) { return emulator::from_word<int>(emulator::to_word(x)); }

__forceinline__ float __expf(float x) { return expf(x); }
__forceinline__ float __logf(float x) { return logf(x); }
__forceinline__ float __log2f(float x) { return log2f(x); }
__forceinline__ float __fdividef(float x, float y) { return x / y; }
__forceinline__ float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// The compiler must not fuse what the source keeps apart.
__forceinline__ float __fmul_rn(float x, float y) {
  float product = x * y;
  asm("" : "+x"(product));
  return product;
}
__forceinline__ float __fadd_rn(float x, float y) {
  float sum = x + y;
  asm("" : "+x"(sum));
  return sum;
}
__forceinline__ float __fsub_rn(float x, float y) { return __fadd_rn(x, -y); }
__forceinline__ float __fdiv_rn(float x, float y) { return x / y; }
__forceinline__ float __fsqrt_rn(float x) { return sqrtf(x); }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
__forceinline__ float __saturatef(float x) { return x > 0.0f ? fminf(x, 1.0f) : 0.0f; }

__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
__forceinline__ int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }
__forceinline__ unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}

// CUDA's min and max take mixed arithmetic types too.
template <typename T, typename U>
__forceinline__ constexpr std::common_type_t<T, U> min(T x, U y) {
  using Common = std::common_type_t<T, U>;
  return static_cast<Common>(y) < static_cast<Common>(x) ? static_cast<Common>(y) : static_cast<Common>(x);
}
template <typename T, typename U>
__forceinline__ constexpr std::common_type_t<T, U> max(T x, U y) {
  using Common = std::common_type_t<T, U>;
  return static_cast<Common>(x) < static_cast<Common>(y) ? static_cast<Common>(y) : static_cast<Common>(x);
}
