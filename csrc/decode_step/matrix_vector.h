// Products of a few vectors with the rows of a weight matrix on the CPU. With one vector they are bound by reading the
// weights; a row is read once for four of them.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/simd.h"
#include "core/transpose.h"

namespace arfast::ARFAST_CPU_TARGET {

// A tile is kFloatLanes pairs of a row and a vector: this many rows for a number of vectors.
template <int kVectors>
constexpr int kProductRows = kFloatLanes / kVectors;

// sums[vector][row] = the lanes' partial sums of the products of rows [depth] and vectors [depth]. Lane i adds the
// elements i, i + kLanes, ... in order, so a product has the same bits in every tile. What lies `ahead` of the rows is
// read soon.
template <typename T, int kRows, int kVectors>
inline void add_products(const T* const* rows, const float* const* vectors, int64_t depth, int64_t ahead, VecF* sums,
                         int sums_stride) {
  VecF sum[kVectors][kRows]{};
  const auto step = [&](const auto& row_at, const auto& vector_at) {
    VecF row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = row_at(rows[r]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const VecF vector = vector_at(vectors[v]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[v][r] = multiply_add(row[r], vector, sum[v][r]);
    }
  };
  int64_t i = 0;
  for (; i + kFloatLanes <= depth; i += kFloatLanes) {
    // Of so many short streams the processor's own prefetching loses track: one thread reads 50 MB of bfloat16 at 23
    // GB/s without this, at 31 to 38 with it (Zen 5, November 2026).
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(rows[r] + ahead + i);
    step([&](const T* p) { return load(p + i); }, [&](const float* p) { return load(p + i); });
  }
  if (i < depth) {
    const int count = static_cast<int>(depth - i);
    step([&](const T* p) { return load_partial(p + i, count, 0); },
         [&](const float* p) { return load_partial(p + i, count, 0); });
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[v * sums_stride + r] = sum[v][r];
  }
}

// Rows [begin, end) of a weight [N, depth].
template <typename T>
struct WeightRows {
  const T* data;
  int64_t depth, begin, end;
};

// out[v][n] = weight[n] . vectors[v]; fresh: whether the weight still has to come from memory.
template <typename T, int kVectors>
inline void multiply_vectors(const WeightRows<T>& weight, const float* const* vectors, bool fresh, float* const* out) {
  constexpr int kRows = kProductRows<kVectors>, kGroup = std::min(kRows, 8);
  for (int64_t n = weight.begin; n < weight.end; n += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, weight.end - n));
    VecF sums[kFloatLanes];
    for (int group = 0; group < kRows; group += kGroup) {
      const T* rows[kGroup];
      for (int r = 0; r < kGroup; ++r) rows[r] = weight.data + (n + std::min(group + r, count - 1)) * weight.depth;
      add_products<T, kGroup, kVectors>(rows, vectors, weight.depth, fresh ? kGroup * weight.depth : 0, sums + group,
                                        kRows);
    }
    float products[kFloatLanes];
    store(products, add_transposed(sums));
    for (int v = 0; v < kVectors; ++v) {
      if (count == kRows) {
        std::memcpy(out[v] + n, products + v * kRows, sizeof(float) * kRows);
      } else {
        std::memcpy(out[v] + n, products + v * kRows, sizeof(float) * count);
      }
    }
  }
}

// out[b, n] = weight[n] . x[b] for x [batch, x_stride] and out [batch, out_stride]. A product depends on its row and
// vector alone.
template <typename T>
void multiply_rows(const WeightRows<T>& weight, const float* x, int64_t x_stride, int64_t batch, float* out,
                   int64_t out_stride) {
  constexpr int kMost = 4;
  for (int64_t b = 0; b < batch; b += kMost) {
    const float* vectors[kMost];
    float* results[kMost];
    for (int v = 0; v < kMost; ++v) {  // what a tile lacks repeats the last vector, and is stored to the same place
      const int64_t row = std::min(b + v, batch - 1);
      vectors[v] = x + row * x_stride;
      results[v] = out + row * out_stride;
    }
    const int64_t left = batch - b;
    const auto multiply = left == 1   ? multiply_vectors<T, 1>
                          : left == 2 ? multiply_vectors<T, 2>
                                      : multiply_vectors<T, kMost>;
    multiply(weight, vectors, b == 0, results);
  }
}

}  // namespace arfast::ARFAST_CPU_TARGET
