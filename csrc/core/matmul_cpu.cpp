// Matrix product on the CPU (Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication"): a tile
// of the output in registers, its operands packed in the order in which the inner loop reads them, a block of `a` in
// the second-level cache and a panel of `b` in the first. Sums run over K in order: the same bits at every call.
#include <algorithm>
#include <cstring>

#include "core/buffer.h"
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
// With fewer rows of the output, an element of `b` is used so seldom that packing it costs more than it saves: from
// dense rows, and where packing would transpose it.
constexpr int64_t kFewRows = 32;
constexpr int64_t kFewRowsTransposed = 8;

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
          for (int j = 0; j < kLanes<T>; ++j) std::memcpy(out + (k + j) * Width + i, &rows[j], kSquare * sizeof(T));
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
void tile(const T* a, const T* b, int64_t b_stride, int64_t depth, int64_t rows, int64_t columns, bool add, T* out,
          int64_t out_stride) {
  using V = Vec<T>;
  V sums[kTileRows][2]{};
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += b_stride) {
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
void multiply(const Matrix& a, const Matrix& b, const Matrix& out, bool add) {
  thread_local const Buffer<T> packed_a(kBlockRows * kBlockDepth), packed_b(kTileColumns<T> * kBlockDepth);
  const bool b_is_dense = b.column_stride == 1 && out.rows < kFewRows;
  for (int64_t i = 0; i < out.rows; i += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, out.rows - i);
    for (int64_t k = 0; k < a.columns; k += kBlockDepth) {
      const int64_t depth = std::min(kBlockDepth, a.columns - k);
      pack<kTileRows>(element<T>(a, i, k), rows, a.row_stride, depth, a.column_stride, packed_a.data());
      for (int64_t j = 0; j < out.columns; j += kTileColumns<T>) {
        const int64_t columns = std::min<int64_t>(kTileColumns<T>, out.columns - j);
        const T* strip = element<T>(b, k, j);
        int64_t stride = b.row_stride;
        if (!b_is_dense || columns < kTileColumns<T>) {
          pack<kTileColumns<T>>(strip, columns, b.column_stride, depth, b.row_stride, packed_b.data());
          strip = packed_b.data();
          stride = kTileColumns<T>;
        }
        for (int64_t row = 0; row < rows; row += kTileRows) {
          tile(packed_a.data() + row * depth, strip, stride, depth, rows - row, columns, add || k > 0,
               const_cast<T*>(element<T>(out, i + row, j)), out.row_stride);
        }
      }
    }
    for (int64_t row = i; a.columns == 0 && !add && row < i + rows; ++row) {
      std::fill_n(const_cast<T*>(element<T>(out, row, 0)), out.columns, T{0});
    }
  }
}

// For few rows, and `b` dense along K: transposes squares of `b` in registers and uses them at once. Every sum runs in
// the order of `multiply`, so the layout of the operands does not show in the result.
template <typename T>
void multiply_few_rows(const Matrix& a, const Matrix& b, const Matrix& out, bool add) {
  constexpr int kRows = kTileRows / 2, kColumns = kLanes<T>;
  for (int64_t j = 0; j < out.columns; j += kColumns) {
    const T* columns[kColumns];
    for (int c = 0; c < kColumns; ++c) columns[c] = element<T>(b, 0, std::min(j + c, out.columns - 1));
    const int count = static_cast<int>(std::min<int64_t>(kColumns, out.columns - j));
    for (int64_t i = 0; i < out.rows; i += kRows) {
      const T* rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = element<T>(a, std::min(i + r, out.rows - 1), 0);
      for (int64_t k = 0; k < a.columns;) {
        const bool adds = add || k > 0;
        const int64_t end = std::min(k + kBlockDepth, a.columns);
        Vec<T> sums[kRows]{};
        for (; k + kColumns <= end; k += kColumns) {
          Vec<T> square[kColumns];
          for (int c = 0; c < kColumns; ++c) square[c] = load(columns[c] + k);
          transpose(square);
          for (int t = 0; t < kColumns; ++t) {
            for (int r = 0; r < kRows; ++r) sums[r] += rows[r][(k + t) * a.column_stride] * square[t];
          }
        }
        for (; k < end; ++k) {
          Vec<T> part{};
          for (int c = 0; c < kColumns; ++c) part[c] = columns[c][k];
          for (int r = 0; r < kRows; ++r) sums[r] += rows[r][k * a.column_stride] * part;
        }
        for (int r = 0; r < kRows && i + r < out.rows; ++r) {
          T* p = const_cast<T*>(element<T>(out, i + r, j));
          store_lanes(p, adds ? load_lanes(p, count) + sums[r] : sums[r], count);
        }
      }
    }
  }
}

template <typename T>
void choose_and_multiply(const MatmulParams& params) {
  const bool few = params.out.rows < kFewRowsTransposed && params.b.row_stride == 1 && params.a.columns > 0;
  (few ? multiply_few_rows<T> : multiply<T>)(params.a, params.b, params.out, params.add);
}

}  // namespace

void matmul(const MatmulParams& params) {
  if (params.dtype == DType::kFloat64) {
    choose_and_multiply<double>(params);
  } else {
    choose_and_multiply<float>(params);
  }
}

}  // namespace arfast::ARFAST_CPU_TARGET
