// Building blocks of the CPU attention kernels: a register-blocked matrix product of packed tiles, packing and tasks.
#pragma once

#include <algorithm>

#include "core/arena.h"
#include "core/cached_attention.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/tasks.h"
#include "core/transpose.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// Vectors per row of a register block: 6 x 4 accumulators where there are 32 registers, 6 x 2 where there are 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif
// Columns of a packed right-hand side.
template <typename A>
constexpr int kPanel = kBlockVectors * kLanes<A>;

// How the left-hand side of a product lies in memory.
enum class Layout { kRowMajor, kColumnMajor };

// Terms that are summed in one chain of roundings; their sum is then added to the result. The error of a score decides
// that of everything after it, and one chain over a large head_dim has twice to three times the error of torch's
// product.
constexpr int64_t kChain = 64;

template <typename A, int kRows, int kVectors, Layout kLayout>
inline void multiply_block(A* c, int64_t ldc, const A* a, int64_t lda, const A* b, int64_t ldb, int64_t depth,
                           bool accumulate) {
  using V = Vec<A>;
  constexpr int kL = kLanes<A>;
  for (int64_t begin = 0; begin < depth; begin += kChain, accumulate = true) {
    V sum[kRows][kVectors] = {};
    for (int64_t k = std::min(kChain, depth - begin); k > 0; --k) {
      V right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kL);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const A left = kLayout == Layout::kColumnMajor ? a[row] : a[row * lda];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[row][v] += left * right[v];
      }
      a += kLayout == Layout::kColumnMajor ? lda : 1;
      b += ldb;
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        A* p = c + row * ldc + v * kL;
        store(p, accumulate ? load(p) + sum[row][v] : sum[row][v]);
      }
    }
  }
}

template <typename A, int kVectors, Layout kLayout>
inline void multiply_columns(A* c, int64_t ldc, const A* a, int64_t lda, const A* b, int64_t ldb, int64_t rows,
                             int64_t depth, bool accumulate) {
  const int64_t step = kLayout == Layout::kColumnMajor ? 1 : lda;
  int64_t row = 0;
  const auto block = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    multiply_block<A, kRows, kVectors, kLayout>(c + row * ldc, ldc, a + row * step, lda, b, ldb, depth, accumulate);
    row += kRows;
  };
  while (rows - row >= 6) block(std::integral_constant<int, 6>{});
  if (rows - row >= 4) block(std::integral_constant<int, 4>{});
  if (rows - row >= 2) block(std::integral_constant<int, 2>{});
  if (rows - row >= 1) block(std::integral_constant<int, 1>{});
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; columns is a multiple of the lanes. Each element is the
// sum over the depth in order, whatever the block it falls into; only that sum is added to c, which keeps chains short.
template <typename A, Layout kLayout>
void multiply(A* c, int64_t ldc, const A* a, int64_t lda, const A* b, int64_t ldb, int64_t rows, int64_t columns,
              int64_t depth, bool accumulate) {
  int64_t vectors = columns / kLanes<A>;
  for (; vectors >= kBlockVectors; vectors -= kBlockVectors, b += kPanel<A>, c += kPanel<A>) {
    multiply_columns<A, kBlockVectors, kLayout>(c, ldc, a, lda, b, ldb, rows, depth, accumulate);
  }
  switch (vectors) {
    case 3:
      return multiply_columns<A, 3, kLayout>(c, ldc, a, lda, b, ldb, rows, depth, accumulate);
    case 2:
      return multiply_columns<A, 2, kLayout>(c, ldc, a, lda, b, ldb, rows, depth, accumulate);
    case 1:
      return multiply_columns<A, 1, kLayout>(c, ldc, a, lda, b, ldb, rows, depth, accumulate);
    default:
      return;
  }
}

// Rows of T at a constant distance. Packing takes anything whose [i] is the pointer to a row.
template <typename T>
struct StridedRows {
  const T* first;
  int64_t stride;
  const T* operator[](int64_t i) const { return first + i * stride; }
};

// `count` rows of `size` elements -> panels [count / kPanel][size][kPanel], transposed; zeros for rows up to the next
// multiple of the lanes.
template <typename T, typename Rows>
inline void pack_panels(const Rows& rows, int64_t count, int64_t size, Acc<T>* target) {
  using A = Acc<T>;
  constexpr int kL = kLanes<A>;
  for (int64_t row = 0; row < count; row += kL) {
    A* panel = target + row / kPanel<A> * kPanel<A> * size + row % kPanel<A>;
    for (int64_t column = 0; column < size; column += kL) {
      const int lanes = static_cast<int>(std::min<int64_t>(kL, size - column));
      Vec<A> square[kL];
      for (int i = 0; i < kL; ++i) square[i] = row + i < count ? load_lanes(rows[row + i] + column, lanes) : Vec<A>{};
      transpose(square);
      for (int i = 0; i < lanes; ++i) store(panel + (column + i) * kPanel<A>, square[i]);
    }
  }
}

// Runs the tasks; on this thread alone if their work, as grain_for counts it, is not worth waking another one.
template <typename F>
void run_tasks(int64_t count, int64_t elements, const F& task) {
  if (elements > grain_for(1)) return arfast::run_tasks(count, task);
  for (int64_t index = 0; index < count; ++index) task(index);
}

}  // namespace
}  // namespace arfast::ARFAST_CPU_TARGET
