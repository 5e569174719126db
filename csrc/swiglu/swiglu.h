// Contract of swiglu: out = silu(gate) * up, elementwise over rows.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"

namespace arfast {

struct SwigluForwardParams {
  DType dtype;
  int64_t num_rows;  // N
  int64_t size;      // I
  const void* gate;  // [N, I]
  const void* up;    // [N, I]
  int64_t gate_stride;
  int64_t up_stride;
  void* out;  // [N, I], dense
};

struct SwigluBackwardParams {
  DType dtype;
  int64_t num_rows;  // N
  int64_t size;      // I
  const void* dout;  // [N, I]
  const void* gate;  // [N, I]
  const void* up;    // [N, I]
  int64_t dout_stride;
  int64_t gate_stride;
  int64_t up_stride;
  void* dgate;  // [N, I], dense
  void* dup;    // [N, I], dense
};

ARFAST_CPU_FUNCTION(swiglu_forward, SwigluForwardParams)
ARFAST_CPU_FUNCTION(swiglu_backward, SwigluBackwardParams)
ARFAST_CUDA_FUNCTION(swiglu_forward, SwigluForwardParams)
ARFAST_CUDA_FUNCTION(swiglu_backward, SwigluBackwardParams)

}  // namespace arfast
