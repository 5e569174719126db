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
  DType dtype;          // of dout, dsum, x, weight, dx
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
  void* dx;       // [N, D], dense
  void* dweight;  // [num_blocks, D], float (double for kFloat64): one partial sum per block of kRmsNormBlock rows
};

// Rows per partial sum of dweight. Fixed, so that the sum does not depend on the number of threads or of
// multiprocessors.
constexpr int64_t kRmsNormBlock = 32;

ARFAST_CPU_FUNCTION(rms_norm_forward, RmsNormForwardParams)
ARFAST_CPU_FUNCTION(rms_norm_backward, RmsNormBackwardParams)
ARFAST_CUDA_FUNCTION(rms_norm_forward, RmsNormForwardParams)
ARFAST_CUDA_FUNCTION(rms_norm_backward, RmsNormBackwardParams)

}  // namespace arfast
