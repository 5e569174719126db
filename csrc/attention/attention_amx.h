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

// Left operand: the transposed of rows [count, size], [size, ld], zeros up to the next multiple of two tiles.
template <typename Rows>
void copy_transposed(const Rows& rows, int64_t count, int64_t size, BFloat16* target, int64_t ld) {
  const auto lanes = std::make_index_sequence<32>();
  const auto halves = [&]<size_t... kLane>(std::index_sequence<kLane...>, int high) {
    return _mm512_set_epi16(static_cast<short>(2 * (31 - kLane) + high)...);
  };
  const __m512i even = halves(lanes, 0), odd = halves(lanes, 1);
  for (int64_t row = 0; row < count; row += 2 * kTile) {
    for (int64_t column = 0; column < size; column += 2 * kTile) {
      const int64_t pairs = std::min<int64_t>(kTile, (size - column) / 2);
      VecF first[kTile], second[kTile];
      load_square(rows, row, count, column, pairs, first);
      load_square(rows, row + kTile, count, column, pairs, second);
      for (int64_t i = 0; i < pairs; ++i) {
        const __m512i a = reinterpret_cast<__m512i>(first[i]), b = reinterpret_cast<__m512i>(second[i]);
        BFloat16* p = target + (column + 2 * i) * ld + row;
        _mm512_storeu_si512(p, _mm512_permutex2var_epi16(a, even, b));
        _mm512_storeu_si512(p + ld, _mm512_permutex2var_epi16(a, odd, b));
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

inline __m512i round_rows(VecF first, VecF second) {
  return round_to_bf16(reinterpret_cast<__m512>(first), reinterpret_cast<__m512>(second));
}

// Two rounded rows, of a left operand.
inline void store_rows(BFloat16* target, int64_t ld, __m512i rows) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_castsi512_si256(rows));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + ld), _mm512_extracti64x4_epi64(rows, 1));
}

// The same as pairs along the rows, of a right operand.
inline void store_pairs(uint32_t* target, __m512i rows) {
  const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(rows));
  const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rows, 1));
  _mm512_storeu_si512(target, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

#endif

// Whether products of T may be those of the matrix units; whether those of a problem are.
#if defined(__AVX512F__)
template <typename T>
constexpr bool kMayTakeAmx = std::is_same_v<T, BFloat16>;
#else
template <typename T>
constexpr bool kMayTakeAmx = false;
#endif
inline bool takes_amx(const AttentionProblem& problem) { return problem.head_dim % kTile == 0 && has_amx(); }

}  // namespace
}  // namespace arfast::ARFAST_CPU_TARGET
