// Matrix product on the CPU (Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication"): a tile
// of the output in registers, its operands packed in the order in which the inner loop reads them, a block of `a` and a
// panel of `b` in the second-level cache, a strip of each in the first. Sums run over K in order: the same bits at
// every call.
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
constexpr int64_t kBlockRows = 384;
constexpr int64_t kBlockDepth = 256;
constexpr int64_t kDepthStep = 16;
constexpr int64_t kPanelColumns = 256;
// With fewer rows of the output, an element of `b` is used so seldom that packing it costs more than it saves: from
// dense rows, and where packing would transpose it.
constexpr int64_t kFewRows = 32;
constexpr int64_t kFewRowsTransposed = 8;

// The size of equal blocks, none larger than `largest`, in whole steps: a full one with a short one behind it would err
// more along the depth, and over rows pack `b` for a few of them.
int64_t equal_blocks(int64_t size, int64_t largest, int64_t step) {
  const int64_t blocks = std::max<int64_t>(1, (size + largest - 1) / largest);
  return std::max((size + blocks * step - 1) / (blocks * step) * step, step);
}

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

// Rows of `a` that are dense along K stay so, kBlockDepth apart; what sticks out of the last strip is zero.
template <typename T>
void copy_rows(const T* source, int64_t rows, int64_t row_stride, int64_t depth, T* out) {
  int64_t row = 0;
  for (; row < rows; ++row) std::memcpy(out + row * kBlockDepth, source + row * row_stride, depth * sizeof(T));
  for (; row % kTileRows != 0; ++row) std::fill_n(out + row * kBlockDepth, depth, T{0});
}

// Asks for two cache lines, which the machine fetches while it computes.
template <bool kToWrite, typename T>
void fetch_two_lines(const T* p) {
  constexpr int kCache = kToWrite ? 3 : 2;  // the first level; the second
  __builtin_prefetch(p, kToWrite, kCache);
  __builtin_prefetch(p + 64 / sizeof(T), kToWrite, kCache);
}

// out[rows, columns] (+)= the product of one strip of each operand, `a` from copy_rows (kDense) or pack. On the way it
// fetches the next tile of the output, below, and kBlockDepth elements from `next` on.
template <bool kDense, typename T>
void tile(const T* a, const T* b, int64_t b_stride, int64_t depth, int64_t rows, int64_t columns, bool add, T* out,
          int64_t out_stride, const T* next) {
  using V = Vec<T>;
  constexpr int64_t kSteps = kBlockDepth / kTileRows, kTwoLines = 128 / sizeof(T);
  V sums[kTileRows][2]{};
  const auto add_products = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k, b += b_stride) {
      const V b0 = load(b), b1 = load(b + kLanes<T>);
      for (int i = 0; i < kTileRows; ++i) {
        const T element = kDense ? a[i * kBlockDepth + k] : a[k * kTileRows + i];
        sums[i][0] += element * b0;
        sums[i][1] += element * b1;
      }
    }
  };
  int64_t k = 0;
  for (const T* below = out + kTileRows * out_stride; k + kSteps <= depth; k += kSteps) {
    fetch_two_lines<true>(below);
    fetch_two_lines<false>(next);
    below += out_stride;
    next += kTwoLines;
    add_products(k, k + kSteps);
  }
  add_products(k, depth);
  if (rows >= kTileRows && columns == kTileColumns<T>) {
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i, out += out_stride) {
      store(out, add ? load(out) + sums[i][0] : sums[i][0]);
      store(out + kLanes<T>, add ? load(out + kLanes<T>) + sums[i][1] : sums[i][1]);
    }
    return;
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
class Product {
 public:
  Product(const Matrix& a, const Matrix& b, const Matrix& out, bool add)
      : a_(a),
        b_(b),
        out_(out),
        add_(add),
        a_is_dense_(a.column_stride == 1),
        uses_b_in_place_(b.column_stride == 1 && out.rows < kFewRows),
        block_depth_(equal_blocks(a.columns, kBlockDepth, kDepthStep)) {}

  void run() const {
    const int64_t height = equal_blocks(out_.rows, kBlockRows, kTileRows);
    for (int64_t row = 0; row < out_.rows; row += height) {
      const int64_t rows = std::min(height, out_.rows - row);
      for (int64_t k = 0; k < a_.columns; k += block_depth_) {
        const int64_t depth = std::min(block_depth_, a_.columns - k);
        if (a_is_dense_) {
          copy_rows(element<T>(a_, row, k), rows, a_.row_stride, depth, packed_a().data());
        } else {
          pack<kTileRows>(element<T>(a_, row, k), rows, a_.row_stride, depth, a_.column_stride, packed_a().data());
        }
        for (int64_t column = 0; column < out_.columns; column += kPanelColumns) {
          multiply_panel(row, rows, k, depth, column, std::min(kPanelColumns, out_.columns - column));
        }
      }
      for (int64_t i = row; a_.columns == 0 && !add_ && i < row + rows; ++i) std::fill_n(out(i, 0), out_.columns, T{0});
    }
  }

 private:
  static const Buffer<T>& packed_a() {
    thread_local const Buffer<T> buffer(kBlockRows * kBlockDepth);
    return buffer;
  }
  static const Buffer<T>& packed_b() {
    thread_local const Buffer<T> buffer(kPanelColumns * kBlockDepth);
    return buffer;
  }

  T* out(int64_t row, int64_t column) const { return const_cast<T*>(element<T>(out_, row, column)); }

  // Where `b` is read after the panel at (k, column).
  const T* after(int64_t k, int64_t column) const {
    if (column + kPanelColumns < out_.columns) return element<T>(b_, k, column + kPanelColumns);
    return element<T>(b_, k + block_depth_ < a_.columns ? k + block_depth_ : 0, 0);
  }

  void pack_b(int64_t k, int64_t depth, int64_t column, int64_t columns, T* target) const {
    pack<kTileColumns<T>>(element<T>(b_, k, column), columns, b_.column_stride, depth, b_.row_stride, target);
  }

  void multiply_panel(int64_t row, int64_t rows, int64_t k, int64_t depth, int64_t column, int64_t columns) const {
    constexpr int64_t kWidth = kTileColumns<T>;
    T* packed = packed_b().data();
    const T* next = after(k, column);
    if (!uses_b_in_place_) pack_b(k, depth, column, columns, packed);
    for (int64_t j = 0; j < columns; j += kWidth) {
      const int64_t width = std::min(kWidth, columns - j);
      const bool in_place = uses_b_in_place_ && width == kWidth;
      const T* strip = in_place ? element<T>(b_, k, column + j) : packed + j * depth;
      const int64_t stride = in_place ? b_.row_stride : kWidth;
      if (uses_b_in_place_ && !in_place) pack_b(k, depth, column + j, width, packed + j * depth);
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const T* left = packed_a().data() + i * (a_is_dense_ ? kBlockDepth : depth);
        (a_is_dense_ ? tile<true, T> : tile<false, T>)(left, strip, stride, depth, rows - i, width, add_ || k > 0,
                                                       out(row + i, column + j), out_.row_stride, next);
        next += b_.row_stride == 1 ? b_.column_stride : b_.row_stride;
      }
    }
  }

  const Matrix &a_, &b_, &out_;
  const bool add_, a_is_dense_, uses_b_in_place_;
  const int64_t block_depth_;
};

// For few rows, and `b` dense along K: transposes squares of `b` in registers and uses them at once. Every sum runs in
// the order of `Product`, so the layout of the operands does not show in the result.
template <typename T>
void multiply_few_rows(const Matrix& a, const Matrix& b, const Matrix& out, bool add) {
  constexpr int kRows = kTileRows / 2, kColumns = kLanes<T>;
  const int64_t block_depth = equal_blocks(a.columns, kBlockDepth, kDepthStep);
  constexpr int64_t kAhead = 384 / sizeof(T);  // of every column, in a line or two it would be too late
  for (int64_t j = 0; j < out.columns; j += kColumns) {
    const T* columns[kColumns];
    for (int c = 0; c < kColumns; ++c) columns[c] = element<T>(b, 0, std::min(j + c, out.columns - 1));
    const int count = static_cast<int>(std::min<int64_t>(kColumns, out.columns - j));
    for (int64_t i = 0; i < out.rows; i += kRows) {
      const T* rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = element<T>(a, std::min(i + r, out.rows - 1), 0);
      for (int64_t k = 0; k < a.columns;) {
        const bool adds = add || k > 0;
        const int64_t end = std::min(k + block_depth, a.columns);
        Vec<T> sums[kRows]{};
        for (; k + kColumns <= end; k += kColumns) {
          Vec<T> square[kColumns];
          for (int c = 0; c < kColumns; ++c) {
            square[c] = load(columns[c] + k);
            __builtin_prefetch(columns[c] + k + kAhead);
          }
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
  if (few) return multiply_few_rows<T>(params.a, params.b, params.out, params.add);
  Product<T>(params.a, params.b, params.out, params.add).run();
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
