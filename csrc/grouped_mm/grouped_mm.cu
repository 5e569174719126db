// Products of groups of rows with a matrix per group, and the gradients of these matrices, on the tensor cores of any
// GPU from sm_80 on: core/grouped_product.cuh.
#include <initializer_list>

#include "core/grouped_product.cuh"
#include "grouped_mm/grouped_mm.h"

namespace arfast {
namespace {

template <typename T, bool kAlongA, bool kAlongB>
using GroupedShape = ProductShape<T, kAlongA, kAlongB, RoundingEpilogue<T>>;

template <typename T>
__device__ MatrixRows<T> rows_of(const Matrix& matrix, int64_t group_offset, int64_t row, int64_t column) {
  const int64_t stride = matrix.column_stride == 1 ? matrix.row_stride : matrix.column_stride;
  const int64_t offset = group_offset + row * matrix.row_stride + column * matrix.column_stride;
  return {static_cast<const T*>(matrix.data) + offset, static_cast<int>(stride)};
}

template <typename Shape>
__global__ void __launch_bounds__(kProductThreads, 2) grouped_mm_kernel(GroupedMmParams params) {
  using T = typename Shape::T;
  const int columns = static_cast<int>(params.out.columns);
  for_each_group_tile(params.offsets, params.num_groups, params.a.rows, columns, [&](const GroupTile& tile) {
    const auto a = rows_of<T>(params.a, 0, tile.row, 0);
    const auto b = rows_of<T>(params.b, tile.group * params.b_group_stride, 0, tile.column);
    const int width = min(columns - tile.column, kProductTile);
    RoundingEpilogue<T> epilogue{rows_of<T>(params.out, 0, tile.row, tile.column), tile.rows, width};
    multiply_group_tile<Shape>(DirectRows<T>{a}, DirectRows<T>{b}, tile.rows, width, static_cast<int>(params.a.columns),
                               epilogue);
  });
}

// Blocks take tiles of the groups' outputs, all of which exist.
template <typename Shape>
__global__ void __launch_bounds__(kProductThreads, 2) grouped_mm_transposed_kernel(GroupedMmTransposedParams params) {
  using T = typename Shape::T;
  const int rows = static_cast<int>(params.out.rows), columns = static_cast<int>(params.out.columns);
  const OutputTile tile(rows, columns);
  const Segment group = segment_at(params.offsets, tile.group, static_cast<int>(params.a.rows));
  const int64_t offset = tile.group * params.out.rows * params.out.columns;
  RoundingEpilogue<T> epilogue{rows_of<T>(params.out, offset, tile.row, tile.column), tile.rows, tile.columns};
  multiply_tile<Shape, kProductTile>(DirectRows<T>{rows_of<T>(params.a, 0, group.begin, tile.row)},
                                     DirectRows<T>{rows_of<T>(params.b, 0, group.begin, tile.column)}, tile.rows,
                                     tile.columns, group.size(), epilogue);
}

const char* refused(std::initializer_list<const Matrix*> matrices) {
  for (const Matrix* matrix : matrices) {
    if (matrix->rows >= 1 << 30 || matrix->columns >= 1 << 30)
      return "matrices must have fewer than 2^30 rows and columns";
    if (matrix->row_stride != 1 && matrix->column_stride != 1) return "matrices must be dense along one dimension";
    if (matrix->row_stride > 0x7fffffff || matrix->column_stride > 0x7fffffff) return "strides must be below 2^31";
  }
  return nullptr;
}

}  // namespace

const char* grouped_mm_cuda(const GroupedMmParams& params, void* stream) {
  if (const char* error = refused({&params.a, &params.b, &params.out})) return error;
  return dispatch_tensor_core_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch_shape = [&](auto shape) {
      using Shape = decltype(shape);
      return launch_group_tiles<Shape>(grouped_mm_kernel<Shape>, params.out.rows, params.num_groups, params.out.columns,
                                       params, stream);
    };
    return params.b.column_stride != 1 ? launch_shape(GroupedShape<T, true, true>{})
                                       : launch_shape(GroupedShape<T, true, false>{});
  });
}

const char* grouped_mm_transposed_cuda(const GroupedMmTransposedParams& params, void* stream) {
  if (const char* error = refused({&params.a, &params.b, &params.out})) return error;
  return dispatch_tensor_core_dtype(params.dtype, [&](auto tag) {
    using Shape = GroupedShape<typename decltype(tag)::type, false, false>;
    return launch_output_tiles<Shape>(grouped_mm_transposed_kernel<Shape>, params.num_groups, params.out.rows,
                                      params.out.columns, params, stream);
  });
}

}  // namespace arfast
