// Products of a few vectors with the rows of a weight matrix on the CPU. With one vector they are bound by reading the
// weights; a row is read once for six of them: five at once take the time that the weights take to come, 73 GFLOP/s of
// one thread, as four and one 60 (Granite Rapids, November 2026).
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/bf16_matmul.h"
#include "core/simd.h"
#include "core/transpose.h"

namespace arfast::ARFAST_CPU_TARGET {

// A tile is kProductRows rows for a number of vectors: few enough that the sums of a group of rows stay in registers.
// It is read in groups of rows that are kGroups apart: of rows that follow each other, two or more share a page of
// memory, and of two streams in a page the processor's own prefetching loses track. Two threads read rows of 2 KB at
// 34 GB/s eight in a row, at 38 two apart (Granite Rapids, November 2026).
constexpr int kProductRows = kFloatLanes;
constexpr int kMostVectors = 6;

// With a vector's elements and, where several vectors use them, those of the rows.
constexpr int registers_of(int vectors, int rows) { return vectors * rows + 1 + (vectors > 1 ? rows : 0); }

constexpr int group_rows(int vectors) {
  constexpr int kRegisters = kVectorBytes == 64 ? 32 : 16;
  int rows = std::min(8, kProductRows);
  while (rows > 1 && registers_of(vectors, rows) > kRegisters) rows /= 2;
  return rows;
}

template <int kVectors>
constexpr int kGroupRows = group_rows(kVectors);
template <int kVectors>
constexpr int kGroups = kProductRows / kGroupRows<kVectors>;

// sums [vectors, kProductRows] = the lanes' partial sums of the products of vectors [depth] and the rows [depth] of a
// group, in their places in the tile. Lane i adds the elements i, i + kLanes, ... in order, so a product has the same
// bits in every tile. `ahead` is where the rows that are read next begin, as far apart as these.
template <typename T, int kVectors, bool kFresh>
inline void add_products(const T* const* rows, const float* const* vectors, int64_t depth, const T* ahead, VecF* sums) {
  constexpr int kRows = kGroupRows<kVectors>, kStep = kGroups<kVectors>;
  VecF sum[kVectors][kRows]{};
  const auto step = [&](const auto& row_at, const auto& vector_at) {
    VecF row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = row_at(rows[r]);
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) {
      const VecF vector = vector_at(vectors[v]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[v][r] = multiply_add(row[r], vector, sum[v][r]);
    }
  };
  int64_t i = 0;
  for (; i + kFloatLanes <= depth; i += kFloatLanes) {
    // One thread reads 50 MB of bfloat16 at 23 GB/s without this, at 31 to 38 with it (Zen 5, November 2026).
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(ahead + r * kStep * depth + i, 0, kFresh ? 3 : 2);
    step([&](const T* p) { return load(p + i); }, [&](const float* p) { return load(p + i); });
  }
  if (i < depth) {
    const int count = static_cast<int>(depth - i);
    step([&](const T* p) { return load_partial(p + i, count, 0); },
         [&](const float* p) { return load_partial(p + i, count, 0); });
  }
#pragma GCC unroll 6
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[v * kProductRows + r * kStep] = sum[v][r];
  }
}

// Rows [begin, end) of a weight [N, depth], and what is read after them.
template <typename T>
struct WeightRows {
  const T* data;
  int64_t depth, begin, end;
  const T* next;
};

// The rows of a group in the tile of `count` rows from n on, the last one repeated for those that are missing.
template <int kVectors, typename T>
inline void locate_rows(const WeightRows<T>& weight, int64_t n, int group, int count, const T** rows) {
  for (int r = 0; r < kGroupRows<kVectors>; ++r) {
    rows[r] = weight.data + (n + std::min(group + r * kGroups<kVectors>, count - 1)) * weight.depth;
  }
}

// What is to come while a group of the tile from n on is multiplied: the next group where the weight is fresh, that is
// still has to come from memory; else, into the second-level cache, the same place in what is read after it.
template <int kVectors, bool kFresh, typename T>
inline const T* locate_next(const WeightRows<T>& weight, int64_t n, int group) {
  const bool last = group + 1 == kGroups<kVectors>, ends = n + kProductRows >= weight.end;
  if (!kFresh) return weight.next + (n - weight.begin + group) * weight.depth;
  if (last && ends) return weight.next;
  return weight.data + (n + (last ? kProductRows : group + 1)) * weight.depth;
}

template <int kVectors>
inline void store_tile(const VecF (&sums)[kVectors][kProductRows], int64_t n, int count, float* const* out) {
  for (int v = 0; v < kVectors; ++v) store_lanes(out[v] + n, add_transposed(sums[v]), count);
}

// out[v][n] = weight[n] . vectors[v]
template <typename T, int kVectors, bool kFresh>
inline void multiply_vectors(const WeightRows<T>& weight, const float* const* vectors, float* const* out) {
  for (int64_t n = weight.begin; n < weight.end; n += kProductRows) {
    const int count = static_cast<int>(std::min<int64_t>(kProductRows, weight.end - n));
    VecF sums[kVectors][kProductRows];
    for (int group = 0; group < kGroups<kVectors>; ++group) {
      const T* rows[kGroupRows<kVectors>];
      locate_rows<kVectors>(weight, n, group, count, rows);
      add_products<T, kVectors, kFresh>(rows, vectors, weight.depth, locate_next<kVectors, kFresh>(weight, n, group),
                                        sums[0] + group);
    }
    store_tile<kVectors>(sums, n, count, out);
  }
}

#if defined(__AVX512F__)
// The same with the instruction that adds the products of two pairs of bfloat16 to a float32: lane i adds the pairs i,
// i + kLanes, ... in order.
constexpr int kPairStep = 2 * kFloatLanes;

template <bool kWhole>
ARFAST_BF16_TARGET inline __m512bh load_pairs(const BFloat16* p, int64_t count) {
  if constexpr (kWhole) return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, p));
}

template <int kRows, int kVectors, bool kWhole>
ARFAST_BF16_TARGET inline void add_pair_step(const BFloat16* const* rows, const BFloat16* const* vectors, int64_t i,
                                             int64_t depth, __m512 (&sum)[kVectors][kRows]) {
  __m512bh row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = load_pairs<kWhole>(rows[r] + i, depth - i);
#pragma GCC unroll 6
  for (int v = 0; v < kVectors; ++v) {
    const __m512bh vector = load_pairs<kWhole>(vectors[v] + i, depth - i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[v][r] = _mm512_dpbf16_ps(sum[v][r], row[r], vector);
  }
}

template <int kVectors, bool kFresh>
ARFAST_BF16_TARGET inline void add_pair_products(const BFloat16* const* rows, const BFloat16* const* vectors,
                                                 int64_t depth, const BFloat16* ahead, VecF* sums) {
  constexpr int kRows = kGroupRows<kVectors>, kStep = kGroups<kVectors>;
  __m512 sum[kVectors][kRows]{};
  int64_t i = 0;
  for (; i + kPairStep <= depth; i += kPairStep) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(ahead + r * kStep * depth + i, 0, kFresh ? 3 : 2);
    add_pair_step<kRows, kVectors, true>(rows, vectors, i, depth, sum);
  }
  if (i < depth) add_pair_step<kRows, kVectors, false>(rows, vectors, i, depth, sum);
#pragma GCC unroll 6
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[v * kProductRows + r * kStep] = reinterpret_cast<VecF>(sum[v][r]);
  }
}

template <int kVectors, bool kFresh>
ARFAST_BF16_TARGET void multiply_pairs(const WeightRows<BFloat16>& weight, const BFloat16* const* vectors,
                                       float* const* out) {
  for (int64_t n = weight.begin; n < weight.end; n += kProductRows) {
    const int count = static_cast<int>(std::min<int64_t>(kProductRows, weight.end - n));
    VecF sums[kVectors][kProductRows];
    for (int group = 0; group < kGroups<kVectors>; ++group) {
      const BFloat16* rows[kGroupRows<kVectors>];
      locate_rows<kVectors>(weight, n, group, count, rows);
      add_pair_products<kVectors, kFresh>(rows, vectors, weight.depth, locate_next<kVectors, kFresh>(weight, n, group),
                                          sums[0] + group);
    }
    store_tile<kVectors>(sums, n, count, out);
  }
}
#endif

template <int kVectors, bool kFresh, typename T, typename X>
inline void multiply_tiles(const WeightRows<T>& weight, const X* const* vectors, float* const* out) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<X, BFloat16>) return multiply_pairs<kVectors, kFresh>(weight, vectors, out);
#endif
  if constexpr (std::is_same_v<X, float>) multiply_vectors<T, kVectors, kFresh>(weight, vectors, out);
}

// multiply_tiles<count>
template <bool kFresh, int kVectors = kMostVectors, typename T, typename X>
void multiply_pass(const WeightRows<T>& weight, const X* const* vectors, int64_t count, float* const* out) {
  if constexpr (kVectors > 1) {
    if (count < kVectors) return multiply_pass<kFresh, kVectors - 1>(weight, vectors, count, out);
  }
  multiply_tiles<kVectors, kFresh>(weight, vectors, out);
}

// out[b, n] = weight[n] . x[b] for x [batch, x_stride] and out [batch, out_stride]. A product depends on its row and
// vector alone. X: float, or BFloat16 like the weight where the machine has_bf16_products.
template <typename T, typename X>
void multiply_rows(const WeightRows<T>& weight, const X* x, int64_t x_stride, int64_t batch, float* out,
                   int64_t out_stride) {
  const int64_t passes = (batch + kMostVectors - 1) / kMostVectors;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = batch * pass / passes, count = batch * (pass + 1) / passes - first;
    const X* vectors[kMostVectors];
    float* results[kMostVectors];
    for (int64_t v = 0; v < count; ++v) {
      vectors[v] = x + (first + v) * x_stride;
      results[v] = out + (first + v) * out_stride;
    }
    if (pass == 0) {
      multiply_pass<true>(weight, vectors, count, results);
    } else {
      multiply_pass<false>(weight, vectors, count, results);
    }
  }
}

}  // namespace arfast::ARFAST_CPU_TARGET
