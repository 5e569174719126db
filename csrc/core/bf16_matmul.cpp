// The blocking of matmul_cpu.cpp (Goto and van de Geijn 2008) around the instruction that adds the products of two
// pairs of bfloat16 to a float32: operands are packed as pairs of neighbours along K. A block of `a` stays in the
// second-level cache, a panel of `b` streams through the first.
#include "core/bf16_matmul.h"

#include <algorithm>

#include "core/cpu_target.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <memory>
#include <new>

namespace arfast {
namespace {

using Pair = uint32_t;  // elements 2k (low half) and 2k + 1 of a row of `a` or a column of `b`

// 8 x 3 vectors of sums, 3 of `b` and a broadcast pair of `a`: 28 of the 32 registers.
constexpr int kTileRows = 8;
constexpr int kTileVectors = 3;
constexpr int kLanes = 16;
constexpr int64_t kTileColumns = kTileVectors * kLanes;
constexpr int64_t kBlockPairs = 256;
constexpr int64_t kBlockRows = 1024;
constexpr int64_t kBlockColumns = 32 * kTileColumns;

struct Operand {
  const uint16_t* data;
  int64_t across_stride;  // between rows of `a`, columns of `b`
  int64_t depth_stride;   // along K
};

__mmask16 first_lanes(int64_t count) { return count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }
__mmask32 first_halves(int64_t count) { return count >= 2 * kLanes ? ~0u : (1u << count) - 1; }

// rows[i][j] <-> rows[j][i]
ARFAST_BF16_TARGET inline void transpose(__m512i rows[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Strips lie a cache line further apart than they are long: of strips that are written side by side, the lines would
// otherwise all fall into one set of the cache.
constexpr int64_t strip_size(int64_t width, int64_t pairs) { return width * pairs + kLanes; }

// Packs strips of `width` (8, 16, 32 or 48): out[strip][pair][width], zeros beyond `across` and beyond `depth`.
ARFAST_BF16_TARGET void pack_along_depth(const Operand& m, int64_t across, int64_t depth, int64_t width, Pair* out) {
  const int64_t pairs = (depth + 1) / 2, square = std::min<int64_t>(width, kLanes);
  for (int64_t begin = 0; begin < across; begin += square) {
    Pair* strip = out + begin / width * strip_size(width, pairs) + begin % width;
    const __mmask16 kept = first_lanes(square);
    for (int64_t k = 0; k < pairs; k += kLanes) {
      const __mmask32 halves = first_halves(depth - 2 * k);
      __m512i rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool inside = i < square && begin + i < across;
        const uint16_t* row = m.data + (inside ? begin + i : 0) * m.across_stride + 2 * k;
        rows[i] = _mm512_maskz_loadu_epi16(inside ? halves : 0, row);
        __builtin_prefetch(row + kLanes * m.across_stride);
      }
      transpose(rows);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, pairs - k); ++i) {
        _mm512_mask_storeu_epi32(strip + (k + i) * width, kept, rows[i]);
      }
    }
  }
}

ARFAST_BF16_TARGET inline __m512i load_halves(const uint16_t* p, __mmask16 kept) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, p));
}

// The same from a matrix that is dense across: whole rows of the source at a time.
ARFAST_BF16_TARGET void pack_across(const Operand& m, int64_t across, int64_t depth, int64_t width, Pair* out) {
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t k = 0; k < pairs; k += 2) {
    const uint16_t* rows = m.data + 2 * k * m.depth_stride;
    for (int64_t i = 0; i < across; i += kLanes) {
      const __mmask16 inside = first_lanes(across - i);
      __m512i pair[2];
      for (int half = 0; half < 2; ++half) {
        const int64_t left = depth - 2 * (k + half);
        const uint16_t* row = rows + (left > 0 ? 2 * half : 0) * m.depth_stride + i;
        const __m512i low = load_halves(row, left > 0 ? inside : 0);
        __builtin_prefetch(row + 4 * m.depth_stride);
        __builtin_prefetch(row + 5 * m.depth_stride);
        const __m512i high = load_halves(row + (left > 1 ? m.depth_stride : 0), left > 1 ? inside : 0);
        pair[half] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      }
      if (width == kTileRows) {  // two strips, of which this is a whole cache line each
        Pair* strip = out + i / width * strip_size(width, pairs) + k * width;
        const __mmask16 kept = first_lanes(kTileRows * std::min<int64_t>(2, pairs - k));
        _mm512_mask_storeu_epi32(strip, kept, _mm512_shuffle_i64x2(pair[0], pair[1], 0x44));
        if (i + kTileRows >= across) continue;
        _mm512_mask_storeu_epi32(strip + strip_size(width, pairs), kept, _mm512_shuffle_i64x2(pair[0], pair[1], 0xee));
      } else {
        Pair* strip = out + i / width * strip_size(width, pairs) + i % width + k * width;
        _mm512_storeu_si512(strip, pair[0]);
        if (k + 1 < pairs) _mm512_storeu_si512(strip + width, pair[1]);
      }
    }
  }
}

void pack_any(const Operand& m, int64_t across, int64_t depth, int64_t width, Pair* out) {
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t strip = 0; strip < across; strip += width, out += kLanes) {
    for (int64_t k = 0; k < pairs; ++k) {
      for (int64_t i = strip; i < strip + width; ++i, ++out) {
        const uint16_t* p = m.data + i * m.across_stride + 2 * k * m.depth_stride;
        *out = i < across ? p[0] : 0;
        if (i < across && 2 * k + 1 < depth) *out |= Pair{p[m.depth_stride]} << 16;
      }
    }
  }
}

void pack(const Operand& m, int64_t across, int64_t depth, int64_t width, Pair* out) {
  const auto pack = m.depth_stride == 1 ? pack_along_depth : m.across_stride == 1 ? pack_across : pack_any;
  pack(m, across, depth, width, out);
}

// What a tile adds to, and where the sum goes.
struct Target {
  float* sums;  // kTileRows rows of `stride`, or nullptr: the product is complete at once
  int64_t sums_stride;
  bool start, finish;
  uint16_t* out;
  int64_t out_stride;
  bool add;
};

inline void prefetch_row(const Target& target, int64_t row, int64_t columns) {
  if (target.finish) {
    const uint16_t* out = target.out + row * target.out_stride;
    for (int64_t j = 0; j < columns; j += 32) __builtin_prefetch(out + j, 1);
    __builtin_prefetch(out + columns - 1, 1);
  }
  if (target.sums != nullptr) {
    for (int64_t j = 0; j < columns; j += kLanes) __builtin_prefetch(target.sums + row * target.sums_stride + j, 1);
  }
}

// One strip of `a` by one of `b`, `Vectors` wide.
template <int Vectors>
ARFAST_BF16_TARGET void tile(const Pair* a, const Pair* b, int64_t pairs, int64_t rows, int64_t columns,
                             const Target& target) {
  __m512 sums[kTileRows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) sums[i][j] = _mm512_setzero_ps();
    // Its lines arrive while the tile is computed.
    if (i < rows) prefetch_row(target, i, Vectors * kLanes);
  }
  for (int64_t k = 0; k < pairs; ++k, a += kTileRows, b += Vectors * kLanes) {
    __m512bh panel[Vectors];
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) panel[j] = (__m512bh)_mm512_loadu_si512(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
#pragma GCC unroll 3
      for (int j = 0; j < Vectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], pair, panel[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= rows) return;
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) {
      const __mmask16 inside = first_lanes(columns - j * kLanes);
      uint16_t* out = target.out + i * target.out_stride + j * kLanes;
      float* so_far = target.sums + i * target.sums_stride + j * kLanes;
      __m512 sum = sums[i][j];
      if (!target.start) {
        sum = _mm512_add_ps(_mm512_loadu_ps(so_far), sum);
      } else if (target.add) {
        sum = _mm512_add_ps((__m512)_mm512_slli_epi32(load_halves(out, inside), 16), sum);
      }
      if (target.finish) {
        _mm256_mask_storeu_epi16(out, inside, (__m256i)_mm512_cvtneps_pbh(sum));
      } else {
        _mm512_storeu_ps(so_far, sum);
      }
    }
  }
}

// Working memory of a thread, kept from call to call and grown as needed.
template <typename T>
T* scratch(int64_t size) {
  struct Free {
    void operator()(T* p) const { operator delete(p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<T, Free> held;
  thread_local int64_t held_size = 0;
  if (held_size < size) {
    held.reset();
    held.reset(static_cast<T*>(operator new(size * sizeof(T), std::align_val_t{64})));
    held_size = size;
  }
  return held.get();
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// out[rows, columns] of one task; `depth` is K.
void multiply_block(const Operand& a, const Operand& b, uint16_t* out, int64_t out_stride, int64_t rows,
                    int64_t columns, int64_t depth, bool add) {
  constexpr int64_t kDepth = 2 * kBlockPairs;
  const int64_t padded_rows = round_up(rows, kTileRows), padded_columns = round_up(columns, kTileColumns);
  Pair* packed_a = scratch<Pair>(padded_rows / kTileRows * strip_size(kTileRows, kBlockPairs) +
                                 (padded_columns / kTileColumns + 1) * strip_size(kTileColumns, kBlockPairs));
  Pair* packed_b = packed_a + padded_rows / kTileRows * strip_size(kTileRows, kBlockPairs);
  float* sums = depth > kDepth ? scratch<float>(padded_rows * padded_columns) : nullptr;
  // Strips of three vectors, and at the end of two: one vector at a time would wait for its loads.
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  const int64_t narrow = vectors % 3 == 1 ? std::min<int64_t>(vectors, 4) : vectors % 3;
  const int64_t wide_columns = std::min(columns, (vectors - narrow) * kLanes);
  const int64_t narrow_width = std::min<int64_t>(narrow, 2) * kLanes;
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t block = std::min(kDepth, depth - k), pairs = (block + 1) / 2;
    const Operand a_block{a.data + k * a.depth_stride, a.across_stride, a.depth_stride};
    const Operand b_block{b.data + k * b.depth_stride, b.across_stride, b.depth_stride};
    pack(a_block, rows, block, kTileRows, packed_a);
    pack(b_block, wide_columns, block, kTileColumns, packed_b);
    Pair* strip = packed_b;
    int64_t width = kTileColumns;
    for (int64_t j = 0; j < columns; strip += strip_size(width, pairs), j += width) {
      if (j == wide_columns) {
        width = narrow_width;
        const Operand rest{b_block.data + j * b.across_stride, b.across_stride, b.depth_stride};
        pack(rest, columns - j, block, width, strip);
      }
      const auto run = width == kTileColumns ? tile<3> : width == 2 * kLanes ? tile<2> : tile<1>;
      for (int64_t i = 0; i < rows; i += kTileRows) {
        run(packed_a + i / kTileRows * strip_size(kTileRows, pairs), strip, pairs, rows - i, columns - j,
            {sums + (j * padded_rows + i * width), width, k == 0, k + block == depth, out + i * out_stride + j,
             out_stride, add});
      }
    }
  }
}

}  // namespace

bool has_bf16_products() {
  static const bool has = cpu_target() >= CpuTarget::kAvx512 && __builtin_cpu_supports("avx512bf16");
  return has;
}

void bf16_matmul(const MatmulParams& params) {
  const auto& [dtype, a, b, out, add] = params;
  auto* data = static_cast<uint16_t*>(out.data);
  for (int64_t i = 0; a.columns == 0 && !add && i < out.rows; ++i) {
    std::fill_n(data + i * out.row_stride, out.columns, uint16_t{0});
  }
  for (int64_t j = 0; j < out.columns; j += kBlockColumns) {
    const Operand columns{static_cast<const uint16_t*>(b.data) + j * b.column_stride, b.column_stride, b.row_stride};
    for (int64_t i = 0; i < out.rows; i += kBlockRows) {
      const Operand rows{static_cast<const uint16_t*>(a.data) + i * a.row_stride, a.row_stride, a.column_stride};
      multiply_block(rows, columns, data + i * out.row_stride + j, out.row_stride, std::min(kBlockRows, out.rows - i),
                     std::min(kBlockColumns, out.columns - j), a.columns, add);
    }
  }
}

}  // namespace arfast

#else

namespace arfast {

bool has_bf16_products() { return false; }
void bf16_matmul(const MatmulParams&) {}

}  // namespace arfast

#endif
