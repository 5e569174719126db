// Gated linear unit with SiLU on the CPU (Shazeer 2020, arXiv 2002.05202, equation 6): threads over rows, every operand
// read once and every result written once.
#include "core/parallel.h"
#include "core/simd.h"
#include "swiglu/swiglu.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

template <typename V>
inline V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

template <typename T>
void forward_row(const SwigluForwardParams& params, int64_t row) {
  const T* gate = static_cast<const T*>(params.gate) + row * params.gate_stride;
  const T* up = static_cast<const T*>(params.up) + row * params.up_stride;
  T* out = static_cast<T*>(params.out) + row * params.size;
  for_each_vector<T>(params.size, [&](int64_t i, int count) {
    const Vec<T> g = load_lanes(gate + i, count);
    store_lanes(out + i, g * sigmoid(g) * load_lanes(up + i, count), count);
  });
}

// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
template <typename T>
void backward_row(const SwigluBackwardParams& params, int64_t row) {
  const T* dout = static_cast<const T*>(params.dout) + row * params.dout_stride;
  const T* gate = static_cast<const T*>(params.gate) + row * params.gate_stride;
  const T* up = static_cast<const T*>(params.up) + row * params.up_stride;
  T* dgate = static_cast<T*>(params.dgate) + row * params.size;
  T* dup = static_cast<T*>(params.dup) + row * params.size;
  for_each_vector<T>(params.size, [&](int64_t i, int count) {
    const Vec<T> d = load_lanes(dout + i, count), g = load_lanes(gate + i, count);
    const Vec<T> s = sigmoid(g);
    store_lanes(dup + i, d * g * s, count);
    store_lanes(dgate + i, d * load_lanes(up + i, count) * s * (1 + g * (1 - s)), count);
  });
}

}  // namespace

void swiglu_forward(const SwigluForwardParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(params.num_rows, grain_for(params.size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) forward_row<T>(params, row);
    });
  });
}

void swiglu_backward(const SwigluBackwardParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(params.num_rows, grain_for(params.size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) backward_row<T>(params, row);
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
