// Operands of the matrix units: bfloat16 tiles, packed in the layouts of multiply_tiles.
#pragma once

#include <cstring>
#include <utility>

#include "attention/attention.h"
#include "attention/attention_tile.h"
#include "core/amx.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// Rows and columns of a tile of sums, and the multiple that head_dim must be of.
constexpr int64_t kTile = 16;

constexpr int64_t round_up_to_tile(int64_t size) { return (size + kTile - 1) / kTile * kTile; }

#if defined(__AVX512F__)

// `count` pairs of neighbours, at most kTile of them; the others are 0.
inline VecF load_pairs(const BFloat16* p, int64_t count) {
  VecF v{};
  if (count >= kTile) {
    std::memcpy(&v, p, sizeof(v));
  } else {
    std::memcpy(&v, p, count * sizeof(uint32_t));
  }
  return v;
}

// kTile pairs of neighbours of each of the rows [first, first + kTile), transposed; zeros for rows from `count` on.
template <typename Rows>
inline void load_square(const Rows& rows, int64_t first, int64_t count, int64_t column, int64_t pairs, VecF* square) {
  for (int64_t i = 0; i < kTile; ++i)
    square[i] = first + i < count ? load_pairs(rows[first + i] + column, pairs) : VecF{};
  transpose(square);
}

// Left operand: rows [count, size], zeros up to the next multiple of a tile.
template <typename Rows>
void copy_rows(const Rows& rows, int64_t count, int64_t size, BFloat16* target, int64_t ld) {
  for (int64_t row = 0; row < count; ++row) std::memcpy(target + row * ld, rows[row], size * sizeof(BFloat16));
  for (int64_t row = count; row < round_up_to_tile(count); ++row) std::fill_n(target + row * ld, size, BFloat16{});
}

// Left operand: the transposed of rows [count, size], [size, ld], zeros up to the next multiple of a tile.
template <typename Rows>
void copy_transposed(const Rows& rows, int64_t count, int64_t size, BFloat16* target, int64_t ld) {
  for (int64_t row = 0; row < count; row += kTile) {
    for (int64_t column = 0; column < size; column += 2 * kTile) {
      const int64_t pairs = std::min<int64_t>(kTile, (size - column) / 2);
      VecF square[kTile];
      load_square(rows, row, count, column, pairs, square);
      for (int64_t i = 0; i < pairs; ++i) {
        const VecU both = reinterpret_cast<VecU>(square[i]);
        BFloat16* p = target + (column + 2 * i) * ld + row;
        store_low_halves(p, both);
        store_low_halves(p + ld, both >> 16);
      }
    }
  }
}

// Right operand: rows [count, size] transposed, pairs along `size`: panels [count / kPanel][size / 2][kPanel], zeros up
// to the next multiple of a tile.
template <typename Rows>
void pack_pair_panels(const Rows& rows, int64_t count, int64_t size, uint32_t* target) {
  constexpr int64_t kWidth = kPanel<float>;
  for (int64_t row = 0; row < count; row += kTile) {
    uint32_t* panel = target + row / kWidth * kWidth * (size / 2) + row % kWidth;
    for (int64_t column = 0; column < size; column += 2 * kTile) {
      const int64_t pairs = std::min<int64_t>(kTile, (size - column) / 2);
      VecF square[kTile];
      load_square(rows, row, count, column, pairs, square);
      for (int64_t i = 0; i < pairs; ++i) {
        _mm512_storeu_si512(panel + (column / 2 + i) * kWidth, reinterpret_cast<__m512i>(square[i]));
      }
    }
  }
}

// Right operand: rows [count, size], pairs along `count`: [count / 2, ld], zeros up to the next multiple of a tile.
template <typename Rows>
void pack_row_pairs(const Rows& rows, int64_t count, int64_t size, uint32_t* target, int64_t ld) {
  const auto load_row = [&](int64_t row, int64_t column) {
    const auto* p = reinterpret_cast<const __m256i*>(rows[row] + column);
    return row < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(p)) : __m512i{};
  };
  for (int64_t row = 0; row < round_up_to_tile(count); row += 2) {
    for (int64_t column = 0; column < size; column += kTile) {
      const __m512i pairs = _mm512_or_si512(load_row(row, column), _mm512_slli_epi32(load_row(row + 1, column), 16));
      _mm512_storeu_si512(target + row / 2 * ld + column, pairs);
    }
  }
}

// Right operand: of two rows, rounded, the pairs along the rows.
inline void store_pairs(uint32_t* target, VecF first, VecF second) {
  const VecU pairs = round_to_bf16(first) | round_to_bf16(second) << 16;
  std::memcpy(target, &pairs, sizeof(pairs));
}

#endif

// Calls f(element, amx) with tags of the element type and of whether the products are those of the matrix units.
template <typename F>
void dispatch(const AttentionProblem& problem, const F& f) {
  dispatch_dtype(problem.dtype, [&](auto element) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<typename decltype(element)::type, BFloat16>) {
      if (problem.head_dim % kTile == 0 && has_amx()) return f(element, std::true_type());
    }
#endif
    f(element, std::false_type());
  });
}

}  // namespace
}  // namespace arfast::ARFAST_CPU_TARGET
