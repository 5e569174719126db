// Contract of rotary: the rotation of channel pairs (i, i + D / 2) of every head by the angle of its row.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"

namespace arfast {

struct RotaryParams {
  DType dtype;         // of x and out
  int64_t num_rows;    // N
  int64_t num_heads;   // H
  int64_t head_dim;    // D, even
  int64_t table_rows;  // P: row n uses table row n % P
  const void* x;       // [N, H, D]
  int64_t x_row_stride;
  int64_t x_head_stride;
  const float* cos;  // [P, D / 2], dense
  const float* sin;  // [P, D / 2], dense
  bool inverse;      // rotate back: the backward pass
  void* out;         // [N, H, D], dense
};

ARFAST_CPU_FUNCTION(rotary, RotaryParams)
ARFAST_CUDA_FUNCTION(rotary, RotaryParams)

}  // namespace arfast
