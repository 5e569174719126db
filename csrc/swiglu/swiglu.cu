// Gated linear unit with SiLU on the GPU (Shazeer 2020, arXiv 2002.05202, equation 6): one vector per thread at a time.
//
// Memory bound. Element moves, each of 2 or 4 bytes: forward 3 (gate, up -> out), backward 5 (dout, gate, up -> dgate,
// dup). As torch operations, silu and a product, the forward moves 5 and keeps silu(gate) beside gate and up; the
// backward moves 9 (two products and the derivative of silu, 3 each).
#include "core/elementwise.cuh"
#include "core/rows.cuh"
#include "swiglu/swiglu.h"

namespace arfast {
namespace {

template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads) swiglu_forward_kernel(SwigluForwardParams params) {
  const int64_t size = params.size;
  for_each_vector<T>(params.num_rows, size, [&](int64_t row, int64_t column) {
    const uint4 gate_bits = row_of<const T>(params.gate, row, params.gate_stride, size).bits_at(column, 0);
    const uint4 up_bits = row_of<const T>(params.up, row, params.up_stride, size).bits_at(column, 0);
    const Vector16<T> gate = from_bits<T>(gate_bits), up = from_bits<T>(up_bits);
    Vector16<T> out;
#pragma unroll
    for (int i = 0; i < Vector16<T>::kSize; ++i) {
      const float g = to_float(gate.elements[i]);
      out.elements[i] = from_float<T>(g * sigmoid(g) * to_float(up.elements[i]));
    }
    row_of<T>(params.out, row, size, size).store_cached(column, out);
  });
}

// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads) swiglu_backward_kernel(SwigluBackwardParams params) {
  const int64_t size = params.size;
  for_each_vector<T>(params.num_rows, size, [&](int64_t row, int64_t column) {
    const uint4 dout_bits = row_of<const T>(params.dout, row, params.dout_stride, size).bits_at(column, 0);
    const uint4 gate_bits = row_of<const T>(params.gate, row, params.gate_stride, size).bits_at(column, 0);
    const uint4 up_bits = row_of<const T>(params.up, row, params.up_stride, size).bits_at(column, 0);
    const Vector16<T> dout = from_bits<T>(dout_bits), gate = from_bits<T>(gate_bits), up = from_bits<T>(up_bits);
    Vector16<T> dgate, dup;
#pragma unroll
    for (int i = 0; i < Vector16<T>::kSize; ++i) {
      const float d = to_float(dout.elements[i]), g = to_float(gate.elements[i]), s = sigmoid(g);
      dup.elements[i] = from_float<T>(d * g * s);
      dgate.elements[i] = from_float<T>(d * to_float(up.elements[i]) * s * (1 + g * (1 - s)));
    }
    row_of<T>(params.dgate, row, size, size).store_cached(column, dgate);
    row_of<T>(params.dup, row, size, size).store_cached(column, dup);
  });
}

// Rows that follow each other without a gap are one long row, of which only the end may miss a whole vector.
template <typename Params>
Params with_joined_rows(Params params, bool dense) {
  if (!dense) return params;
  params.size *= params.num_rows;
  params.num_rows = 1;
  return params;
}

}  // namespace

const char* swiglu_forward_cuda(const SwigluForwardParams& given, void* stream) {
  const bool dense = given.gate_stride == given.size && given.up_stride == given.size;
  const SwigluForwardParams params = with_joined_rows(given, dense);
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(swiglu_forward_kernel<T>, elementwise_shape<T>(params.num_rows, params.size), stream, params);
  });
}

const char* swiglu_backward_cuda(const SwigluBackwardParams& given, void* stream) {
  const bool dense =
      given.dout_stride == given.size && given.gate_stride == given.size && given.up_stride == given.size;
  const SwigluBackwardParams params = with_joined_rows(given, dense);
  return dispatch_gpu_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(swiglu_backward_kernel<T>, elementwise_shape<T>(params.num_rows, params.size), stream, params);
  });
}

}  // namespace arfast
