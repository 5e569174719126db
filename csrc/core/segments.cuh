// Matrices whose rows form consecutive segments (documents, the rows of an expert) that are known to the GPU alone.
#pragma once

#include "core/reduce.cuh"

namespace arfast {

// Rows [begin, end).
struct Segment {
  int begin, end;
  __device__ int size() const { return end - begin; }
};

// Segment `index` of offsets [count + 1]. Offsets that nobody has checked reach no row outside the matrix.
__device__ inline Segment segment_at(const int32_t* offsets, int64_t index, int num_rows) {
  const int begin = max(0, min(offsets[index], num_rows));
  return {begin, max(begin, min(offsets[index + 1], num_rows))};
}

// A tile of up to kTile rows of a segment.
struct SegmentTile {
  int segment;  // -1: there is no such tile
  Segment rows;
  int number;  // in the segment
};

template <int kTile, typename Integer>
__host__ __device__ constexpr Integer tiles_of(Integer rows) {
  return (rows + kTile - 1) / kTile;
}

// The index-th tile when those of `count` segments follow each other. segment(i) gives segment i: each lane looks at
// four of 128, whose loads are on their way together. All lanes of a warp call it alike.
template <int kTile, typename F>
__device__ SegmentTile find_segment_tile(int index, int count, const F& segment) {
  constexpr int kOfLane = 4;
  const int lane = threadIdx.x % kWarpSize;
  for (int first = 0; first < count; first += kOfLane * kWarpSize) {
    const int mine = first + kOfLane * lane;
    int sizes[kOfLane], tiles = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      sizes[i] = tiles_of<kTile>(segment(min(mine + i, count - 1)).size());
      if (mine + i >= count) sizes[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) tiles += sizes[i];
    const int up_to = warp_inclusive_sum(tiles);
    const unsigned after = __ballot_sync(0xffffffffu, up_to > index);
    if (after == 0) {
      index -= __shfl_sync(0xffffffffu, up_to, kWarpSize - 1);
      continue;
    }
    int number = index - (up_to - tiles), found = mine;  // as the lane that owns the tile sees it
#pragma unroll
    for (int i = 0; i < kOfLane - 1; ++i) {
      if (found == mine + i && number >= sizes[i]) {
        number -= sizes[i];
        ++found;
      }
    }
    const int owner = __ffs(static_cast<int>(after)) - 1;
    found = __shfl_sync(0xffffffffu, found, owner);
    return {found, segment(found), __shfl_sync(0xffffffffu, number, owner)};
  }
  return {-1, {}, 0};
}

}  // namespace arfast
