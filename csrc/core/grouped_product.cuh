// Products of groups of rows, each with a matrix of its own: which tiles of them there are and which block takes which.
// Where groups begin is known to the GPU alone.
#pragma once

#include "core/matrix_product.cuh"
#include "core/runtime.cuh"
#include "core/segments.cuh"

namespace arfast {

// Up to kProductTile rows of a group, and the columns from `column` on.
struct GroupTile {
  int group, row, rows, column;
};

// Gives the block its tiles of rows [num_rows] x `columns`, one after the other: a launch has as many blocks as the GPU
// holds, whatever the groups are. The tiles of a group follow each other, so that its matrix is read from the cache by
// all but the first; those that share rows are neighbours. The next kernel may begin while the last tiles are
// multiplied.
template <typename F>
__device__ void for_each_group_tile(const int32_t* offsets, int64_t num_groups, int64_t num_rows, int columns,
                                    const F& f) {
  const int column_tiles = tiles_of<kProductTile>(columns), groups = static_cast<int>(num_groups);
  const auto group = [&](int i) { return segment_at(offsets, i, static_cast<int>(num_rows)); };
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    const SegmentTile tile = find_segment_tile<kProductTile>(static_cast<int>(index / column_tiles), groups, group);
    if (tile.segment < 0) return;
    const int first = tile.number * kProductTile;
    f(GroupTile{tile.segment, tile.rows.begin + first, min(tile.rows.size() - first, kProductTile),
                static_cast<int>(index % column_tiles) * kProductTile});
  }
}

// A block's tile of outputs [groups, rows, columns], all of which exist.
struct OutputTile {
  int64_t group;
  int row, column, rows, columns;

  __device__ OutputTile(int64_t num_rows, int64_t num_columns) {
    const int64_t column_tiles = tiles_of<kProductTile>(num_columns), row_tiles = tiles_of<kProductTile>(num_rows);
    group = blockIdx.x / (column_tiles * row_tiles);
    row = static_cast<int>(blockIdx.x / column_tiles % row_tiles) * kProductTile;
    column = static_cast<int>(blockIdx.x % column_tiles) * kProductTile;
    rows = static_cast<int>(min(num_rows - row, int64_t{kProductTile}));
    columns = static_cast<int>(min(num_columns - column, int64_t{kProductTile}));
  }
};

// A tile of few rows waits for the columns of b alone: more of them are on their way then.
template <typename Shape, typename RowsA, typename RowsB>
__device__ void multiply_group_tile(const RowsA& rows_of_a, const RowsB& columns_of_b, int rows, int columns, int depth,
                                    typename Shape::Epilogue& epilogue) {
  if (rows <= kProductFewRows) {
    multiply_tile<Shape, kProductFewRows>(rows_of_a, columns_of_b, rows, columns, depth, epilogue);
  } else {
    multiply_tile<Shape, kProductTile>(rows_of_a, columns_of_b, rows, columns, depth, epilogue);
  }
}

// A kernel of for_each_group_tile. A group of n rows has at most n / kProductTile + 1 tiles of rows.
template <typename Shape, typename Params>
const char* launch_group_tiles(void (*kernel)(Params), int64_t rows, int64_t groups, int64_t columns,
                               const Params& params, void* stream) {
  const int64_t tiles = (rows / kProductTile + groups) * tiles_of<kProductTile>(columns);
  if (rows == 0 || tiles == 0) return nullptr;
  if (tiles > 0x7fffffff) return "the output must have fewer than 2^31 tiles";
  LaunchShape shape{dim3(1), dim3(kProductThreads), sizeof(typename Shape::Smem)};
  shape.programmatic = true;
  const int64_t resident = resident_clusters(kernel, shape);
  shape.grid = dim3(static_cast<unsigned>(tiles < resident || resident == 0 ? tiles : resident));
  return launch(kernel, shape, stream, params);
}

// A kernel of OutputTile.
template <typename Shape, typename Params>
const char* launch_output_tiles(void (*kernel)(Params), int64_t groups, int64_t rows, int64_t columns,
                                const Params& params, void* stream) {
  const int64_t tiles = groups * tiles_of<kProductTile>(rows) * tiles_of<kProductTile>(columns);
  if (tiles == 0) return nullptr;
  if (tiles > 0x7fffffff) return "the outputs must have fewer than 2^31 tiles";
  const LaunchShape shape{dim3(static_cast<unsigned>(tiles)), dim3(kProductThreads), sizeof(typename Shape::Smem)};
  return launch(kernel, shape, stream, params);
}

}  // namespace arfast
