// Matrix products of the CPU implementations, on the calling thread alone.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/dtype.h"

namespace arfast {

// A view; strides in elements.
struct Matrix {
  void* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

inline Matrix dense_matrix(void* data, int64_t rows, int64_t columns) { return {data, rows, columns, columns, 1}; }
inline Matrix transposed(const Matrix& m) { return {m.data, m.columns, m.rows, m.column_stride, m.row_stride}; }

// out = a b, or out + a b. Rows of `out` are dense.
struct MatmulParams {
  DType dtype;
  Matrix a;    // [M, K]
  Matrix b;    // [K, N]
  Matrix out;  // [M, N]
  bool add = false;
};

// Implementations get a product from their binding, which knows the fastest one for the type; within a parallel region
// it stays on the calling thread.
using Matmul = void (*)(const MatmulParams& params);

// Our own product of float and double.
ARFAST_CPU_FUNCTION(matmul, MatmulParams)

// That of float and bfloat16 by matrix units, where has_amx(). Of float it is as accurate, faster where every element
// is used often, and the bits of an element depend on its row of `a`, its column of `b` and the matrices' largest
// elements. Of bfloat16 the sum is kept in float and rounded once, its bits depend on row and column alone, and
// subnormal numbers count as zero; K is 1 to kTileMatmulDepth, and one stride of `a` and of `b` is 1.
constexpr int64_t kTileMatmulDepth = 1024;
ARFAST_CPU_FUNCTION(tile_matmul, MatmulParams)

}  // namespace arfast
