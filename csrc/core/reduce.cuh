// Reductions over a warp and over a block, in a fixed order: the same bits at every run.
#pragma once

#if defined(ARFAST_EMULATED)
#include "emulator/device.h"
#else
#include <cuda_runtime.h>
#endif

namespace arfast {

constexpr int kWarpSize = 32;

// The sum over every `kLanes` neighbouring lanes of a warp, given to each of them.
template <int kLanes = kWarpSize>
__device__ inline float warp_sum(float value) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The largest in the same way. A NaN is passed over.
template <int kLanes = kWarpSize>
__device__ inline float warp_max(float value) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// The sum over a block of `kThreads`, given to every thread. `scratch` holds kThreads / 32 floats; the leading barrier
// lets callers use it again at once.
template <int kThreads>
__device__ inline float block_sum(float value, float* scratch) {
  static_assert(kThreads % kWarpSize == 0 && kThreads / kWarpSize <= kWarpSize);
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  return warp_sum(lane < kThreads / kWarpSize ? scratch[lane] : 0.0f);
}

// __shfl_up_sync and __shfl_sync of all lanes, for integers of 128 bits too.
template <typename Integer>
__device__ inline Integer shuffle_up(Integer value, int offset) {
  return __shfl_up_sync(0xffffffffu, value, offset);
}
template <>
__device__ inline unsigned __int128 shuffle_up(unsigned __int128 value, int offset) {
  const auto low = shuffle_up(static_cast<unsigned long long>(value), offset);
  const auto high = shuffle_up(static_cast<unsigned long long>(value >> 64), offset);
  return static_cast<unsigned __int128>(high) << 64 | low;
}
template <typename Integer>
__device__ inline Integer shuffle(Integer value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <>
__device__ inline unsigned __int128 shuffle(unsigned __int128 value, int lane) {
  const auto low = shuffle(static_cast<unsigned long long>(value), lane);
  const auto high = shuffle(static_cast<unsigned long long>(value >> 64), lane);
  return static_cast<unsigned __int128>(high) << 64 | low;
}

// The sum over the lanes up to the calling one.
template <typename Integer>
__device__ inline Integer warp_inclusive_sum(Integer value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const Integer lower = shuffle_up(value, offset);
    if (lane >= offset) value += lower;
  }
  return value;
}

// The sum over the threads of the block before the calling one. `scratch` holds an entry per warp and is not in use.
template <typename Integer>
__device__ inline Integer block_exclusive_sum(Integer value, Integer* scratch) {
  const Integer inclusive = warp_inclusive_sum(value);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (lane == kWarpSize - 1) scratch[warp] = inclusive;
  __syncthreads();
  Integer before = inclusive - value;
  for (int w = 0; w < warp; ++w) before += scratch[w];
  return before;
}

}  // namespace arfast
