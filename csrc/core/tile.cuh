// Where elements of a tile lie: swizzled shared memory, wgmma's descriptors, the fragments of mma.sync and wgmma.
// Integer functions only.
#pragma once

#include <cstdint>

#if defined(ARFAST_EMULATED)
#include "emulator/device.h"
#endif

namespace arfast {

// The byte offset, in a tile of rows of 128 bytes that begins at a multiple of 1024, at which the 128-byte swizzle of
// tensor maps and wgmma puts byte `offset`: the 16-byte chunk's number is exclusive-ored with the row's, modulo 8.
__host__ __device__ constexpr uint32_t swizzle_128(uint32_t offset) { return offset ^ (offset >> 3 & 0x70); }

// wgmma's description of an operand in shared memory with 128-byte swizzle. Its rows of 128 bytes hold 64 elements of k
// (K-major; the leading offset is not used) or of the other dimension (`leading_bytes` leads to the next 64). The
// stride leads to the next 8 rows: 1024 when they follow each other. A step of 16 in k adds 32 bytes (K-major) or 16
// rows.
__host__ __device__ constexpr uint64_t swizzled_descriptor(uint32_t shared_address, uint32_t leading_bytes,
                                                           uint32_t stride_bytes) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(shared_address) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | uint64_t{1} << 62;
}

// The place of accumulator i of a thread in the tile of its warp (mma.sync: 16 x 8, i < 4) or warpgroup (wgmma: 64 x N,
// i < N / 2).
__host__ __device__ constexpr int fragment_row(int thread, int i) {
  return thread % 128 / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
}
__host__ __device__ constexpr int fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace arfast
