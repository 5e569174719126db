// Rotary position embedding on the CPU (Su et al. 2021, arXiv 2104.09864, equation 34; channels paired as in GPT-NeoX):
// threads over rows; the angles of a row serve all its heads.
#include "core/parallel.h"
#include "core/simd.h"
#include "rotary/rotary.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// A table vector in the type of the arithmetic on T.
template <typename T>
inline Vec<T> load_angle(const float* table, int count) {
  if constexpr (std::is_same_v<T, double>) {
    VecD v{};
    for (int lane = 0; lane < count; ++lane) v[lane] = table[lane];
    return v;
  } else {
    return load_lanes(table, count);
  }
}

template <typename T>
void rotate_row(const RotaryParams& params, int64_t row) {
  const int64_t half = params.head_dim / 2;
  const float* cos = params.cos + row % params.table_rows * half;
  const float* sin = params.sin + row % params.table_rows * half;
  for (int64_t head = 0; head < params.num_heads; ++head) {
    const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride + head * params.x_head_stride;
    T* out = static_cast<T*>(params.out) + (row * params.num_heads + head) * params.head_dim;
    for_each_vector<T>(half, [&](int64_t i, int count) {
      const Vec<T> c = load_angle<T>(cos + i, count), angle = load_angle<T>(sin + i, count);
      const Vec<T> s = params.inverse ? -angle : angle;
      const Vec<T> a = load_lanes(x + i, count), b = load_lanes(x + half + i, count);
      store_lanes(out + i, a * c - b * s, count);
      store_lanes(out + half + i, b * c + a * s, count);
    });
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
