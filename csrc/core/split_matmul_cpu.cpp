// Products of float by units that multiply bfloat16 (Henry, Tang and Heinecke 2019, arXiv 1904.06376): a number is the
// sum of three bfloat16, 8 bits of it each, and of the nine products of two sums the six largest are added; the others
// are together about 2^-23 of the product at most. Blocks as in matmul_cpu.cpp.
#include "core/matmul.h"
#include "core/simd.h"

#if defined(__AVX512F__)

#include <algorithm>
#include <cstring>

#include "core/amx.h"
#include "core/buffer.h"
#include "core/transpose.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

constexpr int64_t kTile = 16;   // rows and columns of a tile of sums, and pairs of a row of its operands
constexpr int64_t kPairs = 16;  // element k of a depth of 32 makes a pair with element k + 16, of both operands
constexpr int64_t kTileSums = kTile * kTile;
// The parts of a strip of rows of `a` or columns of `b`, two tiles wide, lie in slices of the depth: those of two
// strips stay in the first-level cache while they are multiplied.
constexpr int64_t kSliceDepth = 2 * kSplitPairs;
constexpr int64_t kSlice = kSplitParts * kSplitPart;
// What lies in the second-level cache: a block of `a`, a panel of `b`, their product.
constexpr int64_t kBlockRows = 320;
constexpr int64_t kBlockDepth = 512;
constexpr int64_t kPanelColumns = 64;

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Columns of `a` or `b` along which sums run are its depth; rows of `a` and columns of `b` lie across.
struct Operand {
  const float* data;
  int64_t across, depth, across_stride, depth_stride;
};

constexpr uint32_t kUpperHalf = 0xffff0000u;

// The largest bfloat16 part of x, rounded to nearest; x keeps the rest.
inline VecU take_part(VecF& x) {
  const VecU part = (reinterpret_cast<VecU>(x) + 0x8000u) & kUpperHalf;
  x -= reinterpret_cast<VecF>(part);
  return part;
}

// The parts of pairs, `low` in the lower halves of the lanes. The third is what is left: at most 8 bits.
inline void split(VecF low, VecF high, VecU (&parts)[kSplitParts]) {
  for (int i = 0; i + 1 < kSplitParts; ++i) parts[i] = take_part(low) >> 16 | take_part(high);
  parts[kSplitParts - 1] = reinterpret_cast<VecU>(low) >> 16 | (reinterpret_cast<VecU>(high) & kUpperHalf);
}

// What tells whether the parts can stand for the numbers: none is too large to be rounded, and the largest is so large
// that no part that matters is subnormal, which the units take for zero. A NaN that rounding makes a zero is in the
// third part yet.
class Range {
 public:
  void see(VecF low, VecF high, VecU first_parts) {
    bits_ |= reinterpret_cast<VecU>(low) | reinterpret_cast<VecU>(high);
    const Halves sizes = reinterpret_cast<Halves>(first_parts & 0x7fff7fffu);
    most_ = most_ > sizes ? most_ : sizes;
  }
  bool fits() const {
    uint32_t any = 0, most = 0;
    for (size_t i = 0; i < kFloatLanes; ++i) any |= bits_[i] & 0x7fffffffu;
    for (size_t i = 0; i < 2 * kFloatLanes; ++i) most = std::max<uint32_t>(most, most_[i]);
    most <<= 16;
    float largest;
    std::memcpy(&largest, &most, sizeof(largest));
    return any == 0 || (largest >= 0x1p-48f && largest < 0x1p127f);
  }

 private:
  typedef uint16_t Halves __attribute__((vector_size(sizeof(VecU))));
  VecU bits_{};
  Halves most_{};
};

// Cuts rows of `a` or columns of `b` into strips of two tiles at most.
struct Strips {
  int64_t size, count = (size + kSplitWidth - 1) / kSplitWidth;
  int64_t begin(int64_t strip) const { return strip * kSplitWidth; }
  int64_t end(int64_t strip) const { return std::min(size, begin(strip + 1)); }
  int64_t tiles(int64_t strip) const { return end(strip) - begin(strip) > kTile ? 2 : 1; }
};

// Packs the parts of a strip from `first` to `last` along its depth, slice by slice, in the layouts of
// multiply_split_tiles: that of `a` if kLeft, else that of `b`. Zeros up to the next multiple of a tile.
template <bool kLeft>
void pack_strip(const Operand& m, int64_t first, int64_t last, uint32_t* out, Range& range) {
  constexpr int64_t kPairStride = kLeft ? 1 : kTile, kStride = kLeft ? kSplitPairs : kTile;
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
      VecF lows[kTile], highs[kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        lows[i] = along_depth ? load_row(across + i, depth) : load_row(across, depth + i);
        highs[i] = along_depth ? load_row(across + i, depth + kPairs) : load_row(across, depth + i + kPairs);
      }
      if (along_depth != kLeft) {
        transpose(lows);
        transpose(highs);
      }
      const int64_t pair = depth % kSliceDepth / 2;
      uint32_t* target = out + depth / kSliceDepth * kSlice + across * kSplitPairs + pair * kPairStride;
      for (int64_t i = 0; i < kTile; ++i, target += kStride) {
        VecU parts[kSplitParts];
        split(lows[i], highs[i], parts);
        range.see(lows[i], highs[i], parts[0]);
        for (int part = 0; part < kSplitParts; ++part) {
          store(reinterpret_cast<float*>(target + part * kSplitPart), reinterpret_cast<VecF>(parts[part]));
        }
      }
    }
  }
}

// Packs all strips, in the order in which the operand lies in memory. Returns whether its range fits.
template <bool kLeft>
bool pack(const Operand& m, const Strips& strips, int64_t strip_size, uint32_t* out) {
  Range range;
  const int64_t step = m.depth_stride == 1 ? m.depth : 2 * kPairs;
  for (int64_t depth = 0; depth < m.depth; depth += step) {
    for (int64_t i = 0; i < strips.count; ++i) {
      const Operand strip{m.data + strips.begin(i) * m.across_stride, strips.end(i) - strips.begin(i), m.depth,
                          m.across_stride, m.depth_stride};
      pack_strip<kLeft>(strip, depth, std::min(depth + step, m.depth), out + i * strip_size, range);
    }
  }
  return range.fits();
}

class SplitProduct {
 public:
  explicit SplitProduct(const MatmulParams& params) : params_(params), a_(params.a), b_(params.b), out_(params.out) {}

  void run() const {
    const TileShapes shapes(TileShapes::kSplit);
    const int64_t blocks = (out_.rows + kBlockRows - 1) / kBlockRows;
    const int64_t height = round_up((out_.rows + blocks - 1) / blocks, kSplitWidth);
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
    thread_local const Buffer<uint32_t> left(kBlockRows / kSplitWidth * kBlockDepth / kSliceDepth * kSlice);
    thread_local const Buffer<uint32_t> right(kPanelColumns / kSplitWidth * kBlockDepth / kSliceDepth * kSlice);
    thread_local const Buffer<float> sums(kBlockRows * kPanelColumns);
    const int64_t slices = (depth + kSliceDepth - 1) / kSliceDepth;
    const Strips down{rows};
    const bool fits = pack<true>({element(a_, row, k), rows, depth, a_.row_stride, a_.column_stride}, down,
                                 slices * kSlice, left.data());
    for (int64_t column = 0; column < out_.columns; column += kPanelColumns) {
      const int64_t columns = std::min(kPanelColumns, out_.columns - column);
      const Strips across{columns};
      if (!fits || !pack<false>({element(b_, k, column), columns, depth, b_.column_stride, b_.row_stride}, across,
                                slices * kSlice, right.data())) {
        matmul({DType::kFloat32, part_of(a_, row, rows, k, depth), part_of(b_, k, depth, column, columns),
                part_of(out_, row, rows, column, columns), adds(k)});
        continue;
      }
      for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t used = round_up(std::min(kSliceDepth, depth - slice * kSliceDepth), 2 * kPairs);
        for (int64_t i = 0; i < down.count; ++i) {
          for (int64_t j = 0; j < across.count; ++j) {
            multiply_split_tiles(sums.data() + tile(down.begin(i), across.begin(j)), tile(kTile, 0),
                                 left.data() + (i * slices + slice) * kSlice,
                                 right.data() + (j * slices + slice) * kSlice, down.tiles(i), across.tiles(j), used,
                                 slice > 0);
          }
        }
      }
      write(sums.data(), row, rows, column, columns, adds(k));
    }
  }

  // Of an element of the sums, which are tiles of kTile columns: where its tile begins.
  static constexpr int64_t tile(int64_t row, int64_t column) {
    return (row / kTile * (kPanelColumns / kTile) + column / kTile) * kTileSums;
  }

  bool adds(int64_t k) const { return params_.add || k > 0; }

  void write(const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns, bool add) const {
    for (int64_t i = 0; i < rows; ++i) {
      float* target = const_cast<float*>(element(out_, row + i, column));
      for_each_vector<float>(columns, [&](int64_t j, int count) {
        const VecF sum = load(sums + tile(i, j) + i % kTile * kTile);
        store_lanes(target + j, add ? load_lanes(target + j, count) + sum : sum, count);
      });
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
