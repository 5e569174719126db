// Contract of grouped_mm: matrix products of row groups, [offsets[e], offsets[e + 1]) of group e.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"
#include "core/matmul.h"

namespace arfast {

// out[rows of e] = a[rows of e] b[e]
struct GroupedMmParams {
  DType dtype;
  int64_t num_groups;      // E
  const int32_t* offsets;  // [E + 1]
  Matrix a;                // [M, K]
  Matrix b;                // [K, N] of group 0
  int64_t b_group_stride;
  Matrix out;     // [M, N]
  Matmul matmul;  // on the CPU
};

// out[e] = a[rows of e]^T b[rows of e]
struct GroupedMmTransposedParams {
  DType dtype;
  int64_t num_groups;      // E
  const int32_t* offsets;  // [E + 1]
  Matrix a;                // [M, K]
  Matrix b;                // [M, N]
  Matrix out;              // [K, N] of group 0, dense; so are the others behind it
  Matmul matmul;
};

ARFAST_CPU_FUNCTION(grouped_mm, GroupedMmParams)
ARFAST_CPU_FUNCTION(grouped_mm_transposed, GroupedMmTransposedParams)
ARFAST_CUDA_FUNCTION(grouped_mm, GroupedMmParams)
ARFAST_CUDA_FUNCTION(grouped_mm_transposed, GroupedMmTransposedParams)

}  // namespace arfast
