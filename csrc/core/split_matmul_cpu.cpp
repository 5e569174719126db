// Products of float by units that multiply bfloat16 (Henry, Tang and Heinecke 2019, arXiv 1904.06376): a number is the
// sum of three bfloat16, 8 bits of it each, and of the nine products of two sums the six largest are added; the others
// are together about 2^-23 of the product at most. Blocks as in matmul_cpu.cpp.
#include "core/matmul.h"
#include "core/simd.h"

#if defined(__AVX512F__)

#include <algorithm>
#include <iterator>

#include "core/amx.h"
#include "core/buffer.h"
#include "core/transpose.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

constexpr int kParts = 3;
constexpr int64_t kTile = 16;       // rows and columns of a tile of sums, and pairs of a row of its operands
constexpr int64_t kPairs = 16;      // element k of a depth of 32 makes a pair with element k + 16, of both operands
constexpr int64_t kStripRows = 64;  // of `a`: with kSliceDepth of its parts they stay in the first-level cache
constexpr int64_t kSliceDepth = 64;
// What lies in the second-level cache: a block of `a`, a panel of `b`, their product.
constexpr int64_t kBlockRows = 320;
constexpr int64_t kBlockDepth = 512;
constexpr int64_t kPanelColumns = 128;

// Pairs of all parts of a slice of a strip.
constexpr int64_t kLeftSlice = kParts * kStripRows * kSliceDepth / 2;
constexpr int64_t kRightSlice = kParts * kTile * kSliceDepth / 2;

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Columns of `a` or `b` along which sums run are its depth; rows of `a` and columns of `b` lie across.
struct Operand {
  const float* data;
  int64_t across, depth, across_stride, depth_stride;
};

// The vector's parts, in the upper halves of the lanes. The third is exact: at most 8 bits are left to it.
inline void split(VecF x, VecU (&parts)[kParts]) {
  for (int i = 0; i < kParts; ++i) {
    parts[i] = (reinterpret_cast<VecU>(x) + 0x8000u) & 0xffff0000u;
    x -= reinterpret_cast<VecF>(parts[i]);
  }
}

inline VecU magnitude(VecF x) { return reinterpret_cast<VecU>(x) & 0x7fffffffu; }

// Cuts rows of `a` or columns of `b` into strips of a few tiles, of heights as equal as can be: a strip of one tile
// takes almost as long as one of four.
struct Strips {
  int64_t size, count, tiles = (size + kTile - 1) / kTile;
  int64_t begin(int64_t strip) const { return strip * tiles / count * kTile; }
  int64_t end(int64_t strip) const { return std::min(size, begin(strip + 1)); }
};
Strips strips_of_rows(int64_t rows) { return {rows, (rows + kStripRows - 1) / kStripRows}; }
Strips strips_of_columns(int64_t columns) { return {columns, (columns + kTile - 1) / kTile}; }

// Packs the parts of a strip from `first` to `last` along its depth, in tiles: [slice of kSliceDepth][part] and then
// kLeft: [kStripRows][kSliceDepth / 2] pairs; else [kSliceDepth / 2][kTile]. Zeros up to the next multiple of a tile.
template <bool kLeft>
void pack_strip(const Operand& m, int64_t first, int64_t last, uint32_t* out, VecU& most) {
  constexpr int64_t kSlicePairs = kSliceDepth / 2, kStride = kLeft ? kSlicePairs : kTile;
  constexpr int64_t kPart = (kLeft ? kStripRows : kTile) * kSlicePairs;
  const bool along_depth = m.depth_stride == 1;
  const int64_t ahead = along_depth ? kTile * m.across_stride : 2 * kPairs * m.depth_stride;
  const auto load_row = [&](int64_t across, int64_t depth) {
    if (across >= m.across || depth >= m.depth) return VecF{};
    const float* p = m.data + across * m.across_stride + depth * m.depth_stride;
    __builtin_prefetch(p + ahead);
    const int64_t left = along_depth ? m.depth - depth : m.across - across;
    return left >= kFloatLanes ? load(p) : load_partial(p, static_cast<int>(left), 0);
  };
  for (int64_t across = 0; across < m.across; across += kTile) {
    for (int64_t depth = first; depth < last; depth += 2 * kPairs) {
      VecF squares[kParts][kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        const VecF low = along_depth ? load_row(across + i, depth) : load_row(across, depth + i);
        const VecF high = along_depth ? load_row(across + i, depth + kPairs) : load_row(across, depth + i + kPairs);
        VecU lows[kParts], highs[kParts];
        split(low, lows);
        split(high, highs);
        for (int part = 0; part < kParts; ++part) {
          squares[part][i] = reinterpret_cast<VecF>(lows[part] >> 16 | highs[part]);
        }
        most = max(most, max(magnitude(low), magnitude(high)));
      }
      const int64_t pair = depth % kSliceDepth / 2;
      uint32_t* target =
          out + depth / kSliceDepth * kParts * kPart + (kLeft ? across * kStride + pair : pair * kStride);
      for (int part = 0; part < kParts; ++part, target += kPart) {
        if (along_depth != kLeft) transpose(squares[part]);
        for (int64_t i = 0; i < kTile; ++i) store(reinterpret_cast<float*>(target + i * kStride), squares[part][i]);
      }
    }
  }
}

// Packs all strips, in the order in which the operand lies in memory. Returns whether the parts can stand for the
// numbers: none is too large to be rounded, and the largest is so large that no part that matters is subnormal, which
// the units take for zero.
template <bool kLeft>
bool pack(const Operand& m, const Strips& strips, int64_t strip_size, uint32_t* out) {
  VecU most{};
  const int64_t step = m.depth_stride == 1 ? m.depth : 2 * kPairs;
  for (int64_t depth = 0; depth < m.depth; depth += step) {
    for (int64_t i = 0; i < strips.count; ++i) {
      const Operand strip{m.data + strips.begin(i) * m.across_stride, strips.end(i) - strips.begin(i), m.depth,
                          m.across_stride, m.depth_stride};
      pack_strip<kLeft>(strip, depth, std::min(depth + step, m.depth), out + i * strip_size, most);
    }
  }
  const uint32_t bits = reduce_max(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  return largest == 0 || (largest >= 0x1p-48f && largest < 0x1p127f);
}

class SplitProduct {
 public:
  explicit SplitProduct(const MatmulParams& params) : params_(params), a_(params.a), b_(params.b), out_(params.out) {}

  void run() const {
    const TileShapes shapes;
    const int64_t blocks = (out_.rows + kBlockRows - 1) / kBlockRows;
    const int64_t height = round_up((out_.rows + blocks - 1) / blocks, kTile);
    for (int64_t row = 0; row < out_.rows; row += height) {
      for (int64_t k = 0; k < a_.columns; k += kBlockDepth) {
        multiply_block(row, std::min(height, out_.rows - row), k, std::min(kBlockDepth, a_.columns - k));
      }
    }
  }

 private:
  static const float* element(const Matrix& m, int64_t row, int64_t column) {
    return static_cast<const float*>(m.data) + row * m.row_stride + column * m.column_stride;
  }
  static Matrix part_of(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    return {const_cast<float*>(element(m, row, column)), rows, columns, m.row_stride, m.column_stride};
  }

  void multiply_block(int64_t row, int64_t rows, int64_t k, int64_t depth) const {
    constexpr int64_t kMostStrips = kBlockRows / kStripRows;
    thread_local const Buffer<uint32_t> left(kMostStrips * kStripRows * kParts * kBlockDepth / 2);
    thread_local const Buffer<uint32_t> right(kPanelColumns * kParts * kBlockDepth / 2);
    thread_local const Buffer<float> sums(kMostStrips * kStripRows * kPanelColumns);
    const int64_t slices = (depth + kSliceDepth - 1) / kSliceDepth;
    const Strips down = strips_of_rows(rows);
    const bool fits = pack<true>({element(a_, row, k), rows, depth, a_.row_stride, a_.column_stride}, down,
                                 slices * kLeftSlice, left.data());
    for (int64_t column = 0; column < out_.columns; column += kPanelColumns) {
      const int64_t columns = std::min(kPanelColumns, out_.columns - column);
      const Strips across = strips_of_columns(columns);
      if (!fits || !pack<false>({element(b_, k, column), columns, depth, b_.column_stride, b_.row_stride}, across,
                                slices * kRightSlice, right.data())) {
        matmul({DType::kFloat32, part_of(a_, row, rows, k, depth), part_of(b_, k, depth, column, columns),
                part_of(out_, row, rows, column, columns), adds(k)});
        continue;
      }
      for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t used = round_up(std::min(kSliceDepth, depth - slice * kSliceDepth), 2 * kPairs);
        for (int64_t i = 0; i < down.count; ++i) {
          for (int64_t j = 0; j < across.count; ++j) {
            add_products(left.data() + (i * slices + slice) * kLeftSlice,
                         right.data() + (j * slices + slice) * kRightSlice,
                         round_up(down.end(i) - down.begin(i), kTile), used, slice > 0,
                         sums.data() + (i * across.count + j) * kStripRows * kTile);
          }
        }
      }
      write(sums.data(), down, across, row, column, adds(k));
    }
  }

  bool adds(int64_t k) const { return params_.add || k > 0; }

  // sums [rows, kTile] (+)= the product of a slice of two strips
  static void add_products(const uint32_t* left, const uint32_t* right, int64_t rows, int64_t depth, bool add,
                           float* sums) {
    constexpr auto at = [](int left_part, int right_part) {
      return TileTerm{left_part * 2 * kLeftSlice / kParts, right_part * kRightSlice / kParts};
    };
    // The smallest first.
    static constexpr TileTerm kTerms[] = {at(0, 2), at(1, 1), at(2, 0), at(0, 1), at(1, 0), at(0, 0)};
    multiply_tiles(sums, kTile, reinterpret_cast<const BFloat16*>(left), kSliceDepth, right, kTile, rows, kTile, depth,
                   add, kTerms, std::size(kTerms));
  }

  // sums [strip of rows][strip of columns][kStripRows][kTile]
  void write(const float* sums, const Strips& down, const Strips& across, int64_t row, int64_t column, bool add) const {
    for (int64_t i = 0; i < down.count; ++i) {
      for (int64_t at = down.begin(i); at < down.end(i); ++at) {
        const float* source = sums + i * across.count * kStripRows * kTile + (at - down.begin(i)) * kTile;
        float* target = const_cast<float*>(element(out_, row + at, column));
        for_each_vector<float>(across.size, [&](int64_t j, int count) {
          const VecF sum = load(source + j * kStripRows);
          store_lanes(target + j, add ? load_lanes(target + j, count) + sum : sum, count);
        });
      }
    }
  }

  const MatmulParams& params_;
  const Matrix &a_, &b_, &out_;
};

}  // namespace

void split_matmul(const MatmulParams& params) {
  const auto& [dtype, a, b, out, add] = params;
  const bool dense = std::min(a.row_stride, a.column_stride) == 1 && std::min(b.row_stride, b.column_stride) == 1;
  if (!dense || a.columns == 0 || out.rows == 0) return matmul(params);
  SplitProduct(params).run();
}

}  // namespace arfast::ARFAST_CPU_TARGET

#else

namespace arfast::ARFAST_CPU_TARGET {

void split_matmul(const MatmulParams& params) { matmul(params); }

}  // namespace arfast::ARFAST_CPU_TARGET

#endif
