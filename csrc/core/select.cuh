// The largest of many keys, by one block, exactly and in order.
#pragma once

#include <cstdint>

#include "core/reduce.cuh"

namespace arfast {

// Threads times the few keys that each of them may push: enough unless the input is arranged against it.
constexpr int kSelectCapacity = 4096;

template <int kThreads>
struct SelectStorage {
  uint64_t best[kThreads];  // of each thread
  uint64_t pushed[kSelectCapacity];
  uint64_t threshold;
  int num_pushed;
};

template <int kThreads>
__device__ uint64_t block_max(uint64_t key, SelectStorage<kThreads>& storage) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, key, offset);
    key = other > key ? other : key;
  }
  __syncthreads();  // best may still be read from the call before
  if (threadIdx.x % kWarpSize == 0) storage.best[threadIdx.x / kWarpSize] = key;
  __syncthreads();
  key = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) {
    key = storage.best[warp] > key ? storage.best[warp] : key;
  }
  return key;
}

// Calls emit(rank, key) once, from any thread, for each of the `wanted` largest keys; fewer when there are fewer. Keys
// are distinct and not 0. for_each(f) calls f(key) for the keys of the calling thread, the same ones at every call; it
// may pass 0 for what is no candidate. No thread uses the storage any more when the first one calls.
//
// At least `wanted` keys reach the wanted-th largest of the threads' maxima, and hardly more: those are pushed and
// ranked by counting. If they do not fit, or there are fewer threads than keys wanted, the maximum is taken `wanted`
// times.
template <int kThreads, typename ForEach, typename Emit>
__device__ void select_largest(int64_t wanted, const ForEach& for_each, const Emit& emit,
                               SelectStorage<kThreads>& storage) {
  uint64_t best = 0;
  for_each([&](uint64_t key) { best = key > best ? key : best; });
  storage.best[threadIdx.x] = best;
  if (threadIdx.x == 0) {
    storage.threshold = 1;
    storage.num_pushed = 0;
  }
  __syncthreads();
  if (wanted <= kThreads && best != 0) {
    int rank = 0;
    for (int i = 0; i < kThreads; ++i) rank += storage.best[i] > best;
    if (rank == wanted - 1) storage.threshold = best;
  }
  __syncthreads();
  const uint64_t threshold = storage.threshold;
  if (best >= threshold) {
    for_each([&](uint64_t key) {
      if (key < threshold) return;
      const int slot = atomicAdd(&storage.num_pushed, 1);  // the order is that of the ranks, not of the slots
      if (slot < kSelectCapacity) storage.pushed[slot] = key;
    });
  }
  __syncthreads();
  const int count = storage.num_pushed;
  if (count <= kSelectCapacity) {
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint64_t key = storage.pushed[i];
      int64_t rank = 0;
      for (int j = 0; j < count && rank < wanted; ++j) rank += storage.pushed[j] > key;
      if (rank < wanted) emit(rank, key);
    }
    return;
  }
  uint64_t last = ~uint64_t{0};
  for (int64_t rank = 0; rank < wanted; ++rank) {
    uint64_t next = 0;
    for_each([&](uint64_t key) {
      if (key < last && key > next) next = key;
    });
    last = block_max<kThreads>(next, storage);
    if (last == 0) return;
    if (threadIdx.x == 0) emit(rank, last);
  }
}

}  // namespace arfast
