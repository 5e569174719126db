// The threads that work on a row together, and what each of them does of it.
#pragma once

#include "core/reduce.cuh"
#include "core/rows.cuh"
#include "core/vector.cuh"

namespace arfast {

constexpr int kRmsNormThreads = 256;

// The threads that share a row, how many vectors of it each holds in registers, and whether rows are ever longer.
template <int threads, int held, bool rest>
struct Team {
  static constexpr int kSize = threads;
  static constexpr int kPerBlock = kRmsNormThreads / threads;
  static constexpr int kHeld = held;
  static constexpr bool kHasRest = rest;
};

// launch_with(Team) with the smallest team for rows of `vectors`.
template <typename F>
const char* with_team(int64_t vectors, const F& launch_with) {
  if (vectors <= 16) return launch_with(Team<16, 1, false>{});
  if (vectors <= 4 * 32) return launch_with(Team<32, 4, false>{});
  if (vectors <= 2 * kRmsNormThreads) return launch_with(Team<kRmsNormThreads, 2, false>{});
  if (vectors <= 4 * kRmsNormThreads) return launch_with(Team<kRmsNormThreads, 4, false>{});
  return launch_with(Team<kRmsNormThreads, 2, true>{});  // the rest and four would not fit the registers
}

// The columns of a row that a thread of a team works on, by vectors of T.
template <typename T, typename Team>
struct Columns {
  static constexpr int kVector = Vector16<T>::kSize;
  int64_t size = 0;  // of the row; 0 for a team without a row, which only takes part in the sums

  __device__ int64_t column(int k) const { return (int64_t{k} * Team::kSize + threadIdx.x % Team::kSize) * kVector; }

  // f(k, column) for the vectors held in registers.
  template <typename F>
  __device__ void held(const F& f) const {
#pragma unroll
    for (int k = 0; k < Team::kHeld; ++k) {
      if (column(k) < size) f(k, column(k));
    }
  }

  // f(column) for the rest.
  template <typename F>
  __device__ void rest(const F& f) const {
    if constexpr (Team::kHasRest) {
      for (int64_t first = column(Team::kHeld); first < size; first += Team::kSize * kVector) f(first);
    }
  }
};

struct TeamSmem {
  float scratch[kRmsNormThreads / kWarpSize];
};

// The sum over a team, for each of its threads. All threads of the block call it.
template <typename Team>
__device__ float team_sum(float value, TeamSmem& smem) {
  if constexpr (Team::kPerBlock > 1) return warp_sum<Team::kSize>(value);
  return block_sum<kRmsNormThreads>(value, smem.scratch);
}

}  // namespace arfast
