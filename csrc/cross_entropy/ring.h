// How the ring of cross_entropy_ring.cu cuts rows: integer functions and its launcher.
#pragma once

#include <cstdint>

#include "cross_entropy/cross_entropy.h"

namespace arfast {

constexpr int kHeldVectors = 8;  // 16-byte vectors of a row that a thread keeps in registers

// A cluster of `blocks` blocks of `threads` threads takes a row, each block a part of at most part_vectors 16-byte
// vectors, while parts of the next rows are on the way into its other stages.
struct RingShape {
  int threads;
  int blocks;  // 0: no such ring
  int part_vectors;
  int stages;
};

constexpr int kRingMinStages = 3;  // two on the way while one is worked on
constexpr int kRingMaxStages = 8;
constexpr int kRingMaxBlocks = 16;        // beyond 8 a device may refuse
constexpr int64_t kRingMinVectors = 512;  // rows up to this take blocks that keep a whole one, many at a time

// The 16-byte vectors that cover the longest row: one that does not begin at a multiple of 16 bytes touches one more.
inline int64_t longest_row_vectors(const CrossEntropyParams& params, int64_t vector_size) {
  const bool aligned = reinterpret_cast<uintptr_t>(params.logits) % 16 == 0 && params.logits_stride % vector_size == 0;
  return (params.vocab_size + (aligned ? 0 : vector_size - 1) + vector_size - 1) / vector_size;
}

// The fewest blocks that hold a row in their registers: two blocks of 256 threads on a multiprocessor, so that one
// works while the other waits for its cluster; for longer rows one block of 512. From the size of a row alone: its bits
// do not depend on how many rows there are.
inline RingShape ring_shape(int64_t vectors, int largest_cluster) {
  if (vectors <= kRingMinVectors) return {};
  for (int threads = 256; threads <= 512; threads *= 2) {
    const int capacity = threads * kHeldVectors;
    for (int blocks = 1; blocks <= largest_cluster; blocks *= 2) {
      if (vectors > int64_t{blocks} * capacity) continue;
      const int64_t even = (vectors + blocks - 1) / blocks;
      const int part = static_cast<int>((even + 7) / 8 * 8);  // parts begin at 128 bytes when the row does
      const int stages = kRingMinStages * capacity / part;
      return {threads, blocks, part, stages < kRingMaxStages ? stages : kRingMaxStages};
    }
  }
  return {};
}

struct RingLaunch {
  bool launched;  // false: rows or device are not for the ring
  const char* error;
};

// Losses and statistics of all rows, and their gradients where dlogits is given. Needs sm_90.
RingLaunch cross_entropy_ring(const CrossEntropyParams& params, void* stream);

}  // namespace arfast
