// Products of groups of rows on the tensor cores of any GPU from sm_80 on. Where groups begin is known to the GPU
// alone: a launch has as many blocks as there can be tiles, and each finds its own. A block multiplies a tile of the
// output in steps along the depth, one of which is multiplied while the next ones arrive; sums are float32 and rounded
// once.
#include <initializer_list>

#include "core/matrix_tile.cuh"
#include "core/runtime.cuh"
#include "core/segments.cuh"
#include "grouped_mm/grouped_mm.h"

namespace arfast {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;  // rows and columns of the output
constexpr int kDepth = 64;  // of a step
constexpr int kStages = 3;
constexpr int kWarpRows = 32, kWarpColumns = 64;  // of a warp: 4 x 2 warps

// The operands of out = a b in shared memory. One that is stored along the depth has its rows (columns of b) as the
// rows of the tile, else the depth.
template <typename Element, bool kAlongDepthA, bool kAlongDepthB>
struct ProductShape {
  using T = Element;
  static constexpr bool kAlongA = kAlongDepthA, kAlongB = kAlongDepthB;
  template <bool kAlong>
  using Operand = std::conditional_t<kAlong, MatrixTile<T, kTile, kDepth>, MatrixTile<T, kDepth, kTile>>;
  using A = Operand<kAlongA>;
  using B = Operand<kAlongB>;
  using Output = MatrixTile<T, kTile, kTile>;

  union Smem {
    struct {
      A a;
      B b;
    } stages[kStages];
    Output out;  // after the last step
  };
};

// A product, and the tile of it that a block takes.
template <typename T>
struct Product {
  MatrixRows<T> a, b, out;  // from the tile on, and from the begin of the depth
  int rows, columns, depth;
};

// Starts to copy what lies at `step` along the depth; what is outside the product becomes zero.
template <typename Tile, bool kAlong, typename T>
__device__ void load_operand(Tile& tile, const MatrixRows<T>& source, int size, int depth, int step) {
  const int first = step * kDepth;
  if constexpr (kAlong) {
    tile.template load<kThreads>({source.first + first, source.stride}, size, depth - first);
  } else {
    tile.template load<kThreads>(source.from(first), depth - first, size);
  }
}

// Where a lane reads the fragments of the warp that begin at `row` (column of b), and those 16 m and 16 k further.
template <typename Shape>
__device__ uint32_t a_address(const typename Shape::A& tile, int row) {
  if constexpr (Shape::kAlongA) return tile.a_address(row);
  return Shape::A::fragment(tile.transposed_a_address(0), 0, row / 16);
}
template <typename Shape>
__device__ void load_a(uint32_t address, int m, int k, uint32_t (&a)[4]) {
  if constexpr (Shape::kAlongA) {
    ptx::ldmatrix_x4(a, Shape::A::fragment(address, 16 * m, k));
  } else {
    ptx::ldmatrix_x4_trans(a, Shape::A::fragment(address, 16 * k, m));
  }
}
template <typename Shape>
__device__ uint32_t b_address(const typename Shape::B& tile, int column) {
  if constexpr (Shape::kAlongB) return tile.b_address(column);
  return Shape::B::fragment(tile.transposed_b_address(0), 0, column / 16);
}
template <typename Shape>
__device__ void load_b(uint32_t address, int n, int k, uint32_t (&b)[4]) {
  if constexpr (Shape::kAlongB) {
    ptx::ldmatrix_x4(b, Shape::B::fragment(address, 16 * n, k));
  } else {
    ptx::ldmatrix_x4_trans(b, Shape::B::fragment(address, 16 * k, n));
  }
}

template <typename Shape>
__device__ void multiply_tile(const Product<typename Shape::T>& product) {
  using T = typename Shape::T;
  auto& smem = shared_storage<typename Shape::Smem>();
  const int warp = threadIdx.x / kWarpSize;
  const int row = warp / 2 * kWarpRows, column = warp % 2 * kWarpColumns;
  const int steps = (product.depth + kDepth - 1) / kDepth;
  const auto load = [&](int step) {
    if (step < steps) {
      auto& stage = smem.stages[step % kStages];
      load_operand<typename Shape::A, Shape::kAlongA>(stage.a, product.a, product.rows, product.depth, step);
      load_operand<typename Shape::B, Shape::kAlongB>(stage.b, product.b, product.columns, product.depth, step);
    }
    ptx::cp_async_commit();
  };
  const uint32_t a_rows = a_address<Shape>(smem.stages[0].a, row),
                 b_columns = b_address<Shape>(smem.stages[0].b, column);
  float sums[2][kWarpColumns / 8][4] = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step is there, and nobody reads the one before any more
    load(step + kStages - 1);
    const uint32_t stage = step % kStages * sizeof(smem.stages[0]);
#pragma unroll 1  // more would hold more addresses than there are registers
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_a<Shape>(a_rows + stage, m, k, a[m]);
#pragma unroll
      for (int n = 0; n < kWarpColumns / 16; ++n) {
        uint32_t b[4];
        load_b<Shape>(b_columns + stage, n, k, b);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          ptx::mma_m16n8k16<T>(sums[m][2 * n], a[m], b[0], b[1]);
          ptx::mma_m16n8k16<T>(sums[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  __syncthreads();  // nobody reads operands any more, and no copy is on its way
#pragma unroll
  for (int m = 0; m < 2; ++m) smem.out.store_accumulators(row + 16 * m, column, sums[m], {1.0f, 1.0f});
  __syncthreads();
  constexpr int kRowsOfWarp = kTile / (kThreads / kWarpSize);
  const int first = warp * kRowsOfWarp;
  smem.out.write_rows(product.out.from(first), first, min(product.rows - first, kRowsOfWarp), product.columns);
}

template <typename T>
__device__ MatrixRows<T> rows_of(const Matrix& matrix, int64_t group_offset, int64_t row, int64_t column) {
  const int64_t stride = matrix.column_stride == 1 ? matrix.row_stride : matrix.column_stride;
  const int64_t offset = group_offset + row * matrix.row_stride + column * matrix.column_stride;
  return {static_cast<const T*>(matrix.data) + offset, static_cast<int>(stride)};
}

// Blocks take tiles of rows, column by column: neighbours share the rows.
template <typename Shape>
__global__ void __launch_bounds__(kThreads, 2) grouped_mm_kernel(GroupedMmParams params) {
  using T = typename Shape::T;
  const int columns = static_cast<int>(params.out.columns), column_tiles = (columns + kTile - 1) / kTile;
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * kTile;
  const auto group = [&](int i) { return segment_at(params.offsets, i, static_cast<int>(params.a.rows)); };
  const int index = static_cast<int>(blockIdx.x / column_tiles), groups = static_cast<int>(params.num_groups);
  const SegmentTile tile = find_segment_tile<kTile>(index, groups, group);
  if (tile.segment < 0) return;
  const int row = tile.rows.begin + tile.number * kTile;
  multiply_tile<Shape>({
      rows_of<T>(params.a, 0, row, 0),
      rows_of<T>(params.b, tile.segment * params.b_group_stride, 0, first_column),
      rows_of<T>(params.out, 0, row, first_column),
      min(tile.rows.end - row, kTile),
      min(columns - first_column, kTile),
      static_cast<int>(params.a.columns),
  });
}

// Blocks take tiles of the groups' outputs.
template <typename Shape>
__global__ void __launch_bounds__(kThreads, 2) grouped_mm_transposed_kernel(GroupedMmTransposedParams params) {
  using T = typename Shape::T;
  const int rows = static_cast<int>(params.out.rows), columns = static_cast<int>(params.out.columns);
  const int column_tiles = (columns + kTile - 1) / kTile, row_tiles = (rows + kTile - 1) / kTile;
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * kTile;
  const int first_row = static_cast<int>(blockIdx.x / column_tiles % row_tiles) * kTile;
  const int64_t number = blockIdx.x / (int64_t{column_tiles} * row_tiles);
  const Segment group = segment_at(params.offsets, number, static_cast<int>(params.a.rows));
  multiply_tile<Shape>({
      rows_of<T>(params.a, 0, group.begin, first_row),
      rows_of<T>(params.b, 0, group.begin, first_column),
      rows_of<T>(params.out, number * params.out.rows * params.out.columns, first_row, first_column),
      min(rows - first_row, kTile),
      min(columns - first_column, kTile),
      group.size(),
  });
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

template <typename Shape, typename Kernel, typename Params>
const char* launch_tiles(Kernel* kernel, int64_t tiles, const Params& params, void* stream) {
  if (tiles > 0x7fffffff) return "the output must have fewer than 2^31 tiles";
  if (tiles == 0) return nullptr;
  const LaunchShape shape{dim3(static_cast<unsigned>(tiles)), dim3(kThreads), sizeof(typename Shape::Smem)};
  return launch(kernel, shape, stream, params);
}

int64_t num_tiles(int64_t size) { return (size + kTile - 1) / kTile; }

}  // namespace

const char* grouped_mm_cuda(const GroupedMmParams& params, void* stream) {
  if (const char* error = refused({&params.a, &params.b, &params.out})) return error;
  // A group of n rows has at most n / kTile + 1 tiles.
  const int64_t row_tiles = params.out.rows > 0 ? params.out.rows / kTile + params.num_groups : 0;
  const int64_t tiles = row_tiles * num_tiles(params.out.columns);
  return dispatch_tensor_core_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Along = ProductShape<T, true, true>;
    using Across = ProductShape<T, true, false>;
    if (params.b.column_stride != 1) return launch_tiles<Along>(grouped_mm_kernel<Along>, tiles, params, stream);
    return launch_tiles<Across>(grouped_mm_kernel<Across>, tiles, params, stream);
  });
}

const char* grouped_mm_transposed_cuda(const GroupedMmTransposedParams& params, void* stream) {
  if (const char* error = refused({&params.a, &params.b, &params.out})) return error;
  const int64_t tiles = params.num_groups * num_tiles(params.out.rows) * num_tiles(params.out.columns);
  return dispatch_tensor_core_dtype(params.dtype, [&](auto tag) {
    using Shape = ProductShape<typename decltype(tag)::type, false, false>;
    return launch_tiles<Shape>(grouped_mm_transposed_kernel<Shape>, tiles, params, stream);
  });
}

}  // namespace arfast
