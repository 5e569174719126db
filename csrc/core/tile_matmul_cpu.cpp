// Products of bfloat16, and of float, by units that multiply bfloat16 (Henry, Tang and Heinecke 2019, arXiv
// 1904.06376): a float is the sum of three bfloat16, 8 bits of it each, and of the nine products of two sums the six
// largest are added; the others are together about 2^-23 of the product at most. Blocks as in matmul_cpu.cpp.
#include "core/matmul.h"
#include "core/simd.h"

#if defined(__AVX512F__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/amx.h"
#include "core/buffer.h"
#include "core/transpose.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

constexpr int64_t kTile = 16;   // rows and columns of a tile of sums
constexpr int64_t kPairs = 16;  // of a row of its operands
constexpr int64_t kTileSums = kTile * kTile;
template <typename T>
constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;
// The parts of a strip of rows of `a` or columns of `b`, two tiles wide, lie in slices of the depth: those of two
// strips stay in the first-level cache while they are multiplied.
template <typename T>
constexpr int64_t kSliceDepth = 2 * slice_pairs(kParts<T>);
template <typename T>
constexpr int64_t kSlice = kParts<T> * slice_part(kParts<T>);
// What lies in the second-level cache: a block of `a`, a panel of `b`, their product. Sums of bfloat16 must be rounded
// once, so that a block is as deep as the matrix.
template <typename T>
constexpr int64_t kBlockRows = kParts<T> == 1 ? 512 : 320;
template <typename T>
constexpr int64_t kBlockDepth = kParts<T> == 1 ? kTileMatmulDepth : 512;
constexpr int64_t kPanelColumns = 64;

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Columns of `a` or `b` along which sums run are its depth; rows of `a` and columns of `b` lie across.
template <typename T>
struct Operand {
  const T* data;
  int64_t across, depth, across_stride, depth_stride;
};

constexpr uint32_t kUpperHalf = 0xffff0000u;

// The largest bfloat16 part of x, rounded to nearest; x keeps the rest.
inline VecU take_part(VecF& x) {
  const VecU part = (reinterpret_cast<VecU>(x) + 0x8000u) & kUpperHalf;
  x -= reinterpret_cast<VecF>(part);
  return part;
}

// The parts of pairs, `low` in the lower halves of the lanes. The last is what is left: at most 8 bits.
template <int kCount>
inline void split(VecF low, VecF high, VecU (&parts)[kCount]) {
  for (int i = 0; i + 1 < kCount; ++i) parts[i] = take_part(low) >> 16 | take_part(high);
  parts[kCount - 1] = reinterpret_cast<VecU>(low) >> 16 | (reinterpret_cast<VecU>(high) & kUpperHalf);
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
  int64_t size, count = (size + kStripWidth - 1) / kStripWidth;
  int64_t begin(int64_t strip) const { return strip * kStripWidth; }
  int64_t end(int64_t strip) const { return std::min(size, begin(strip + 1)); }
  int64_t tiles(int64_t strip) const { return end(strip) - begin(strip) > kTile ? 2 : 1; }
};

// Packs the parts of a strip from `first` to `last` along its depth, slice by slice, in the layouts of multiply_strips:
// that of `a` if kLeft, else that of `b`. Zeros up to the next multiple of a tile. Element k of a depth of 32 makes a
// pair with element k + 16.
template <bool kLeft>
void pack_strip(const Operand<float>& m, int64_t first, int64_t last, uint32_t* out, Range& range) {
  constexpr int64_t kPart = slice_part(kParts<float>);
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
      const int64_t pair = depth % kSliceDepth<float> / 2;
      uint32_t* target = out + depth / kSliceDepth<float> * kSlice<float> + across * slice_pairs(3) + pair * kTile;
      for (int64_t i = 0; i < kTile; ++i, target += kPairs) {
        VecU parts[kParts<float>];
        split(lows[i], highs[i], parts);
        range.see(lows[i], highs[i], parts[0]);
        for (int part = 0; part < kParts<float>; ++part) {
          store(reinterpret_cast<float*>(target + part * kPart), reinterpret_cast<VecF>(parts[part]));
        }
      }
    }
  }
}

// Neighbours in two rows of bfloat16 as pairs: of the first and of the last 16 columns.
inline void make_pairs(__m512i low, __m512i high, VecF& first, VecF& last) {
  alignas(64) static constexpr uint16_t kFirst[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i index = _mm512_load_si512(kFirst);
  first = reinterpret_cast<VecF>(_mm512_permutex2var_epi16(low, index, high));
  last = reinterpret_cast<VecF>(_mm512_permutex2var_epi16(low, _mm512_add_epi16(index, _mm512_set1_epi16(16)), high));
}

// The same of bfloat16, a whole strip at a time. Neighbours make a pair: along the depth nothing needs to be moved.
template <bool kLeft>
void pack_strip(const Operand<BFloat16>& m, int64_t first, int64_t last, uint32_t* out, Range&) {
  constexpr int64_t kSquare = 2 * kPairs;  // rows of 64 bytes, as many as they have elements
  const bool along_depth = m.depth_stride == 1;
  const int64_t row_stride = along_depth ? m.across_stride : m.depth_stride;
  for (int64_t depth = first; depth < last; depth += kSquare) {
    const BFloat16* data = m.data + depth * m.depth_stride;
    const int64_t left = std::min(kSquare, m.depth - depth), rows = along_depth ? m.across : left;
    const int64_t columns = along_depth ? left : m.across;
    const __mmask32 inside = columns >= kSquare ? ~0u : (1u << columns) - 1;
    const auto load_row = [&](int64_t i) {
      if (i >= rows) return __m512i{};
      const BFloat16* row = data + i * row_stride;
      __builtin_prefetch(row + (along_depth ? kStripWidth : kSquare) * row_stride, 0, 2);
      return _mm512_maskz_loadu_epi16(inside, row);
    };
    const int64_t pair = depth % kSliceDepth<BFloat16> / 2;
    uint32_t* target = out + depth / kSliceDepth<BFloat16> * kSlice<BFloat16> + pair * kTile;
    VecF squares[2][kTile];  // of either tile, a row of it or the pair of a depth in each
    for (int64_t i = 0; i < kTile; ++i) {
      if (along_depth) {
        squares[0][i] = reinterpret_cast<VecF>(load_row(i));
        squares[1][i] = reinterpret_cast<VecF>(load_row(kTile + i));
      } else {
        make_pairs(load_row(2 * i), load_row(2 * i + 1), squares[0][i], squares[1][i]);
      }
    }
    for (int64_t tile = 0; tile < (m.across > kTile ? 2 : 1); ++tile, target += kTile * slice_pairs(1)) {
      if (along_depth != kLeft) transpose(squares[tile]);
      for (int64_t i = 0; i < kTile; ++i) store(reinterpret_cast<float*>(target + i * kPairs), squares[tile][i]);
    }
  }
}

// Packs all strips, in the order in which the operand lies in memory. Returns whether its range fits, as that of
// bfloat16 always does.
template <bool kLeft, typename T>
bool pack(const Operand<T>& m, const Strips& strips, int64_t strip_size, uint32_t* out) {
  Range range;
  const int64_t step = m.depth_stride == 1 ? m.depth : 2 * kPairs;
  for (int64_t depth = 0; depth < m.depth; depth += step) {
    for (int64_t i = 0; i < strips.count; ++i) {
      const Operand<T> strip{m.data + strips.begin(i) * m.across_stride, strips.end(i) - strips.begin(i), m.depth,
                             m.across_stride, m.depth_stride};
      pack_strip<kLeft>(strip, depth, std::min(depth + step, m.depth), out + i * strip_size, range);
    }
  }
  return range.fits();
}

template <typename T>
class TileProduct {
 public:
  explicit TileProduct(const MatmulParams& params) : params_(params), a_(params.a), b_(params.b), out_(params.out) {}

  void run() const {
    const TileShapes shapes(TileShapes::kWhole);
    const int64_t blocks = (out_.rows + kBlockRows<T> - 1) / kBlockRows<T>;
    const int64_t height = round_up((out_.rows + blocks - 1) / blocks, kStripWidth);
    for (int64_t row = 0; row < out_.rows; row += height) {
      for (int64_t k = 0; k < a_.columns; k += kBlockDepth<T>) {
        multiply_block(row, std::min(height, out_.rows - row), k, std::min(kBlockDepth<T>, a_.columns - k));
      }
    }
  }

 private:
  static const T* element(const Matrix& m, int64_t row, int64_t column) {
    return static_cast<const T*>(m.data) + row * m.row_stride + column * m.column_stride;
  }
  static Matrix part_of(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    return {const_cast<T*>(element(m, row, column)), rows, columns, m.row_stride, m.column_stride};
  }

  void multiply_block(int64_t row, int64_t rows, int64_t k, int64_t depth) const {
    thread_local const Buffer<uint32_t> left(kBlockRows<T> * kBlockDepth<T> / 2 * kParts<T>);
    thread_local const Buffer<uint32_t> right(kPanelColumns * kBlockDepth<T> / 2 * kParts<T>);
    thread_local const Buffer<float> sums(kBlockRows<T> * kPanelColumns);
    const int64_t slices = (depth + kSliceDepth<T> - 1) / kSliceDepth<T>;
    const Strips down{rows};
    const bool fits = pack<true, T>({element(a_, row, k), rows, depth, a_.row_stride, a_.column_stride}, down,
                                    slices * kSlice<T>, left.data());
    for (int64_t column = 0; column < out_.columns; column += kPanelColumns) {
      const int64_t columns = std::min(kPanelColumns, out_.columns - column);
      const Strips across{columns};
      if (!fits || !pack<false, T>({element(b_, k, column), columns, depth, b_.column_stride, b_.row_stride}, across,
                                   slices * kSlice<T>, right.data())) {
        matmul({params_.dtype, part_of(a_, row, rows, k, depth), part_of(b_, k, depth, column, columns),
                part_of(out_, row, rows, column, columns), adds(k)});
        continue;
      }
      for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t used = round_up(std::min(kSliceDepth<T>, depth - slice * kSliceDepth<T>), 2 * kPairs);
        for (int64_t i = 0; i < down.count; ++i) {
          for (int64_t j = 0; j < across.count; ++j) {
            multiply_strips(kParts<T>, sums.data() + tile(down.begin(i), across.begin(j)), tile(kTile, 0),
                            left.data() + (i * slices + slice) * kSlice<T>,
                            right.data() + (j * slices + slice) * kSlice<T>, down.tiles(i), across.tiles(j), used,
                            slice > 0);
            if (slice + 1 < slices) continue;
            write(sums.data() + tile(down.begin(i), across.begin(j)),
                  part_of(out_, row + down.begin(i), down.end(i) - down.begin(i), column + across.begin(j),
                          across.end(j) - across.begin(j)),
                  adds(k));
          }
        }
      }
    }
  }

  // Of an element of the sums, which are tiles of kTile columns: where its tile begins.
  static constexpr int64_t tile(int64_t row, int64_t column) {
    return (row / kTile * (kPanelColumns / kTile) + column / kTile) * kTileSums;
  }

  bool adds(int64_t k) const { return params_.add || k > 0; }

  void write(const float* sums, const Matrix& out, bool add) const {
    for (int64_t i = 0; i < out.rows; ++i) {
      T* target = const_cast<T*>(element(out, i, 0));
      for_each_vector<T>(out.columns, [&](int64_t j, int count) {
        const VecF sum = load(sums + tile(i, j) + i % kTile * kTile);
        store_lanes(target + j, add ? load_lanes(target + j, count) + sum : sum, count);
      });
    }
  }

  const MatmulParams& params_;
  const Matrix &a_, &b_, &out_;
};

}  // namespace

void tile_matmul(const MatmulParams& params) {
  if (params.dtype == DType::kBFloat16) return TileProduct<BFloat16>(params).run();
  const auto& [dtype, a, b, out, add] = params;
  const bool dense = std::min(a.row_stride, a.column_stride) == 1 && std::min(b.row_stride, b.column_stride) == 1;
  if (!dense || a.columns == 0 || out.rows == 0) return matmul(params);
  TileProduct<float>(params).run();
}

}  // namespace arfast::ARFAST_CPU_TARGET

#else

namespace arfast::ARFAST_CPU_TARGET {

void tile_matmul(const MatmulParams& params) { matmul(params); }

}  // namespace arfast::ARFAST_CPU_TARGET

#endif
