// Contract of rms_norm: sizes, strides (in elements) and pointers shared by the binding, the CPU and the CUDA
// implementation.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"

namespace arfast {

struct RmsNormForwardParams {
  DType dtype;          // of x, residual, weight, out, sum
  int64_t num_rows;     // N
  int64_t hidden_size;  // D
  double eps;
  const void* x;         // [N, D]
  const void* residual;  // [N, D] or nullptr
  const void* weight;    // [D]
  int64_t x_stride;
  int64_t residual_stride;
  void* out;    // [N, D], dense
  void* sum;    // [N, D], dense: x + residual, which the norm is taken of; nullptr without a residual
  float* rstd;  // [N]: 1 / sqrt(mean(x^2) + eps); double when dtype is kFloat64
};

struct RmsNormBackwardParams {
  DType dtype;          // of dout, dsum, x, weight, dx, dweight
  int64_t num_rows;     // N
  int64_t hidden_size;  // D
  const void* dout;     // [N, D]
  const void* dsum;     // [N, D] or nullptr: the gradient that reaches x + residual past the norm
  const void* x;        // [N, D]: what the norm was taken of
  const void* weight;   // [D]
  const float* rstd;    // [N]; double when dtype is kFloat64
  int64_t dout_stride;
  int64_t dsum_stride;
  int64_t x_stride;
  int64_t rows_per_partial;
  void* dx;         // [N, D], dense
  float* partials;  // [P, D]: the sums of dweight over rows_per_partial rows each; double when dtype is kFloat64
  void* dweight;    // [D]
};

// Rows per partial sum of dweight: a function of the sizes alone, so that the sum depends neither on the number of
// threads nor on that of multiprocessors. On a GPU one block adds them up: 396 blocks are three for each of 132
// multiprocessors, and with at least 8 rows the partial sums stay small beside the rows.
inline int64_t rms_norm_rows_per_partial(int64_t num_rows, bool on_cpu) {
  if (on_cpu) return 32;
  const int64_t rows = (num_rows + 395) / 396;
  return rows > 8 ? rows : 8;
}

ARFAST_CPU_FUNCTION(rms_norm_forward, RmsNormForwardParams)
ARFAST_CPU_FUNCTION(rms_norm_backward, RmsNormBackwardParams)
ARFAST_CUDA_FUNCTION(rms_norm_forward, RmsNormForwardParams)
ARFAST_CUDA_FUNCTION(rms_norm_backward, RmsNormBackwardParams)

}  // namespace arfast
