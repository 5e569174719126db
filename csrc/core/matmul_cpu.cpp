// Matrix product on the CPU (Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication"): a tile
// of the output in registers, its operands packed in the order in which the inner loop reads them, a block of `a` in
// the second-level cache and a panel of `b` in the first. Sums run over K in order: the same bits at every call.
#include <algorithm>
#include <vector>

#include "core/matmul.h"
#include "core/simd.h"
#include "core/transpose.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// The tile is kTileRows x 2 vectors: it and its operands just fit the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
template <typename T>
constexpr int kTileColumns = 2 * kLanes<T>;
constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockDepth = 256;

template <typename T>
const T* element(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const T*>(m.data) + row * m.row_stride + column * m.column_stride;
}

// Packs a block whose dimension `across` (rows of a, columns of b) is cut into strips of `Width`, each stored depth by
// depth: out[strip][depth][width]. What sticks out of the last strip is zero.
template <int Width, typename T>
void pack(const T* source, int64_t across, int64_t across_stride, int64_t depth, int64_t depth_stride, T* out) {
  constexpr int kSquare = std::min(Width, kLanes<T>);
  for (int64_t begin = 0; begin < across; begin += Width, out += Width * depth) {
    const T* strip = source + begin * across_stride;
    const int width = static_cast<int>(std::min<int64_t>(Width, across - begin));
    int64_t k = 0;
    if (width == Width && across_stride == 1) {
      for (; k < depth; ++k) {
        for (int i = 0; i < Width; ++i) out[k * Width + i] = strip[k * depth_stride + i];
      }
    } else if (width == Width && depth_stride == 1) {
      for (; k + kLanes<T> <= depth; k += kLanes<T>) {
        for (int i = 0; i < Width; i += kSquare) {
          Vec<T> rows[kLanes<T>]{};
          for (int j = 0; j < kSquare; ++j) rows[j] = load(strip + (i + j) * across_stride + k);
          transpose(rows);
          for (int j = 0; j < kLanes<T>; ++j) store_partial<T>(out + (k + j) * Width + i, rows[j], kSquare);
        }
      }
    }
    for (; k < depth; ++k) {
      for (int i = 0; i < Width; ++i) {
        out[k * Width + i] = i < width ? strip[i * across_stride + k * depth_stride] : T{0};
      }
    }
  }
}

// out[rows, columns] (+)= the product of one strip of each operand.
template <typename T>
void tile(const T* a, const T* b, int64_t depth, int64_t rows, int64_t columns, bool add, T* out, int64_t out_stride) {
  using V = Vec<T>;
  V sums[kTileRows][2]{};
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kTileColumns<T>) {
    const V b0 = load(b), b1 = load(b + kLanes<T>);
    for (int i = 0; i < kTileRows; ++i) {
      sums[i][0] += a[i] * b0;
      sums[i][1] += a[i] * b1;
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= rows) return;
    for (int half = 0; half < 2; ++half) {
      const int count = static_cast<int>(std::clamp<int64_t>(columns - half * kLanes<T>, 0, kLanes<T>));
      T* p = out + i * out_stride + half * kLanes<T>;
      store_lanes(p, add ? load_lanes(p, count) + sums[i][half] : sums[i][half], count);
    }
  }
}

template <typename T>
void multiply(const Matrix& a, const Matrix& b, const Matrix& out) {
  thread_local std::vector<T> packed_a, packed_b;
  packed_a.resize(kBlockRows * kBlockDepth);
  packed_b.resize(kTileColumns<T> * kBlockDepth);
  for (int64_t i = 0; i < out.rows; i += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, out.rows - i);
    for (int64_t k = 0; k < a.columns; k += kBlockDepth) {
      const int64_t depth = std::min(kBlockDepth, a.columns - k);
      pack<kTileRows>(element<T>(a, i, k), rows, a.row_stride, depth, a.column_stride, packed_a.data());
      for (int64_t j = 0; j < out.columns; j += kTileColumns<T>) {
        const int64_t columns = std::min<int64_t>(kTileColumns<T>, out.columns - j);
        pack<kTileColumns<T>>(element<T>(b, k, j), columns, b.column_stride, depth, b.row_stride, packed_b.data());
        for (int64_t row = 0; row < rows; row += kTileRows) {
          tile(packed_a.data() + row * depth, packed_b.data(), depth, rows - row, columns, k > 0,
               const_cast<T*>(element<T>(out, i + row, j)), out.row_stride);
        }
      }
    }
    for (int64_t row = i; a.columns == 0 && row < i + rows; ++row) {
      std::fill_n(const_cast<T*>(element<T>(out, row, 0)), out.columns, T{0});
    }
  }
}

}  // namespace

void matmul(const MatmulParams& params) {
  if (params.dtype == DType::kFloat64) {
    multiply<double>(params.a, params.b, params.out);
  } else {
    multiply<float>(params.a, params.b, params.out);
  }
}

}  // namespace arfast::ARFAST_CPU_TARGET
