// Rotary position embedding on the CPU (Su et al. 2021, arXiv 2104.09864, equation 34; channels paired as in GPT-NeoX):
// threads over rows; the angles of a row serve all its heads.
#include "core/parallel.h"
#include "core/rotation.h"
#include "rotary/rotary.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

template <typename T>
void rotate_row(const RotaryParams& params, int64_t row) {
  const int64_t half = params.head_dim / 2;
  const float* cos = params.cos + row % params.table_rows * half;
  const float* sin = params.sin + row % params.table_rows * half;
  for (int64_t head = 0; head < params.num_heads; ++head) {
    const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride + head * params.x_head_stride;
    T* out = static_cast<T*>(params.out) + (row * params.num_heads + head) * params.head_dim;
    rotate_head(x, cos, sin, half, params.inverse, out);
  }
}

}  // namespace

void rotary(const RotaryParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(params.num_rows, grain_for(params.num_heads * params.head_dim), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) rotate_row<T>(params, row);
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
