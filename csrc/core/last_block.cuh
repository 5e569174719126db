// The last block to finish continues with what all of them left in global memory.
#pragma once

#include "core/ptx.cuh"

namespace arfast {

// Whether the calling block is the last of `expected` that arrive at `counter`, which is 0 before the launch. Then its
// threads see what the threads of all of them wrote before. `is_last` is shared memory.
__device__ inline bool arrive_last(uint32_t* counter, uint32_t expected, bool& is_last) {
  __syncthreads();
  if (threadIdx.x == 0) is_last = ptx::add_acquire_release(counter, 1) == expected - 1;
  __syncthreads();
  return is_last;
}

}  // namespace arfast
