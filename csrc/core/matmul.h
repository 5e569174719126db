// The matrix product of the CPU implementations. They get it from their binding, which passes torch's own kernels, so
// that they know no more of torch than this.
#pragma once

#include <cstdint>

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

// out = a b. Callable from any thread; within a parallel region it runs on the calling thread alone.
using Matmul = void (*)(DType dtype, const Matrix& a, const Matrix& b, const Matrix& out);

}  // namespace arfast
