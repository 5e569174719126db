// Products of matrices on the tensor cores of any GPU from sm_80 on, a tile of the output at a time. The block goes
// along the depth in steps, one of which is multiplied while the next ones arrive. Sums are float32. Where the rows of
// the operands lie and what becomes of the sums is the kernel's to say.
#pragma once

#include "core/matrix_tile.cuh"
#include "core/runtime.cuh"
#include "core/segments.cuh"

namespace arfast {

constexpr int kProductThreads = 256;
constexpr int kProductTile = 128;    // rows and columns of the output
constexpr int kProductFewRows = 16;  // of a tile so flat that it waits for the columns of b alone
constexpr int kProductDepth = 64;    // of a step

// How a tile of kRows rows is multiplied: steps in shared memory, rows and columns of a warp.
template <int kRows>
struct ProductTiling {
  static constexpr int kStages = 3, kWarpRows = 32, kWarpColumns = 64;
};
template <>
struct ProductTiling<kProductFewRows> {
  static constexpr int kStages = 5, kWarpRows = kProductFewRows, kWarpColumns = 16;
};

// The operands of a b in shared memory. One that is stored along the depth has its rows (columns of b) as the rows of
// the tile, else the depth. The epilogue's memory takes their place after the last step.
template <typename Element, bool kAlongDepthA, bool kAlongDepthB, typename Epilogue_>
struct ProductShape {
  using T = Element;
  using Epilogue = Epilogue_;
  static constexpr bool kAlongA = kAlongDepthA, kAlongB = kAlongDepthB;
  template <bool kAlong, int kSize>
  using Operand = std::conditional_t<kAlong, MatrixTile<T, kSize, kProductDepth>, MatrixTile<T, kProductDepth, kSize>>;

  template <int kRows>
  struct Stage {
    Operand<kAlongA, kRows> a;
    Operand<kAlongB, kProductTile> b;
  };
  // Across the depth a flat tile of a would be mostly padding; nobody multiplies one.
  static constexpr int kFlatStages = kAlongA ? ProductTiling<kProductFewRows>::kStages : 1;
  union Smem {
    Stage<kProductTile> stages[ProductTiling<kProductTile>::kStages];
    Stage<kProductFewRows> flat_stages[kFlatStages];
    typename Epilogue::Smem epilogue;

    template <int kRows>
    __device__ Stage<kRows>& stage(int step) {
      if constexpr (kRows == kProductTile) {
        return stages[step % ProductTiling<kRows>::kStages];
      } else {
        return flat_stages[step % ProductTiling<kRows>::kStages];
      }
    }
  };
};

// Rows that lie one after the other: the operand without detours.
template <typename T>
struct DirectRows {
  static constexpr bool kInMemory = false;  // whether finding a row takes a load
  MatrixRows<T> rows;
  __device__ int index(int row) const { return row; }
};

// Rows that are picked: row i is row source[i] of `rows`. Whatever nobody has checked names one that exists.
template <typename T>
struct PickedRows {
  static constexpr bool kInMemory = true;
  MatrixRows<T> rows;
  int num_rows;
  const int32_t* source;
  __device__ int index(int row) const { return max(0, min(source[row], num_rows - 1)); }
};

// Copies an operand, step by step. A thread has the same chunk of the same rows of the tile in every step. Where these
// lie, if it must be loaded, it knows one step ahead.
template <typename Tile, bool kAlong, typename Rows>
class OperandLoader {
  static constexpr int kStep = kProductThreads / Tile::kRowChunks;  // rows at a time
  static constexpr int kCount = (Tile::kHeight + kStep - 1) / kStep;
  static_assert(Tile::kChunks == Tile::kRowChunks);

 public:
  // `size` rows of a, or columns of b.
  __device__ OperandLoader(const Rows& rows, int size, int depth) : rows_(rows), size_(size), depth_(depth) {
    aligned_ = is_aligned16(rows.rows.first) && rows.rows.stride % Tile::kChunk == 0;
    if constexpr (Rows::kInMemory) find_rows(0, kAlong ? size : depth);
  }

  // Steps come in order. What is outside the product becomes zero.
  __device__ void load(Tile& tile, int step) {
    const int first = step * kProductDepth, left = depth_ - first;
    const int chunk = threadIdx.x % Tile::kRowChunks, column = chunk * Tile::kChunk;
    const int num_rows = kAlong ? size_ : left;
    const int filled = max(0, min((kAlong ? left : size_) - column, Tile::kChunk));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = row_of_thread(i);
      if (row >= Tile::kHeight) break;
      const int index = Rows::kInMemory ? index_[i] : rows_.index(kAlong ? row : first + row);
      const auto* from = rows_.rows.at(index) + (kAlong ? first : 0) + column;
      tile.copy_chunk(row, chunk, from, row < num_rows ? filled : 0, aligned_, rows_.rows.first);
    }
    if constexpr (Rows::kInMemory && !kAlong) find_rows(first + kProductDepth, depth_);
  }

 private:
  __device__ static int row_of_thread(int i) { return threadIdx.x / Tile::kRowChunks + i * kStep; }
  __device__ void find_rows(int first, int end) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = first + row_of_thread(i);
      index_[i] = row < end ? rows_.index(row) : 0;
    }
  }

  Rows rows_;
  int size_, depth_;
  bool aligned_;
  int index_[kCount];  // of the next step's rows
};

// Where a lane reads the fragments of the warp that begin at `row` (column of b) of a tile, and those 16 rows and 16 k
// further. kAsA: as the a operand.
template <typename Tile, bool kAlong, bool kAsA>
struct OperandFragments {
  uint32_t address;

  __device__ OperandFragments(const Tile& tile, int row) {
    if constexpr (kAlong) {
      address = kAsA ? tile.a_address(row) : tile.b_address(row);
    } else {
      address = Tile::fragment(kAsA ? tile.transposed_a_address(0) : tile.transposed_b_address(0), 0, row / 16);
    }
  }
  __device__ void load(uint32_t stage, int i, int k, uint32_t (&registers)[4]) const {
    if constexpr (kAlong) {
      ptx::ldmatrix_x4(registers, Tile::fragment(address + stage, 16 * i, k));
    } else {
      ptx::ldmatrix_x4_trans(registers, Tile::fragment(address + stage, 16 * k, i));
    }
  }
};

// A tile of a b, of which `rows` x `columns` exist, by the whole block. Then, each followed by a barrier:
// epilogue.begin(smem); epilogue.add(smem, row, column, sums) for every 16 rows of a warp, of which `sums` has the
// accumulators of 8 columns each; epilogue.template end<kRows>(smem).
template <typename Shape, int kRows, typename RowsA, typename RowsB>
__device__ void multiply_tile(const RowsA& rows_of_a, const RowsB& columns_of_b, int rows, int columns, int depth,
                              typename Shape::Epilogue& epilogue) {
  using T = typename Shape::T;
  using Tiling = ProductTiling<kRows>;
  using Stage = typename Shape::template Stage<kRows>;
  using A = decltype(Stage::a);
  using B = decltype(Stage::b);
  constexpr int kWarpsAcross = kProductTile / Tiling::kWarpColumns;
  constexpr int kM = Tiling::kWarpRows / 16, kN = Tiling::kWarpColumns / 16;
  static_assert(Shape::kAlongA || kRows == kProductTile);
  auto& smem = shared_storage<typename Shape::Smem>();
  const int warp = threadIdx.x / kWarpSize;
  const int row = warp / kWarpsAcross * Tiling::kWarpRows, column = warp % kWarpsAcross * Tiling::kWarpColumns;
  const bool has_part = row < rows && column < columns;
  const int steps = (depth + kProductDepth - 1) / kProductDepth;
  OperandLoader<A, Shape::kAlongA, RowsA> a_loader(rows_of_a, rows, depth);
  OperandLoader<B, Shape::kAlongB, RowsB> b_loader(columns_of_b, columns, depth);
  const auto load = [&](int step) {
    if (step < steps) {
      Stage& stage = smem.template stage<kRows>(step);
      a_loader.load(stage.a, step);
      b_loader.load(stage.b, step);
    }
    ptx::cp_async_commit();
  };
  const Stage& first = smem.template stage<kRows>(0);
  const OperandFragments<A, Shape::kAlongA, true> a_fragments(first.a, row);
  const OperandFragments<B, Shape::kAlongB, false> b_fragments(first.b, column);
  float sums[kM][2 * kN][4] = {};
  for (int step = 0; step < Tiling::kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tiling::kStages - 2>();
    __syncthreads();  // this step is there, and nobody reads the one before any more
    load(step + Tiling::kStages - 1);
    if (!has_part) continue;
    const uint32_t stage = step % Tiling::kStages * sizeof(Stage);
#pragma unroll 1  // more would hold more addresses than there are registers
    for (int k = 0; k < kProductDepth / 16; ++k) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) a_fragments.load(stage, m, k, a[m]);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        uint32_t b[4];
        b_fragments.load(stage, n, k, b);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma_m16n8k16<T>(sums[m][2 * n], a[m], b[0], b[1]);
          ptx::mma_m16n8k16<T>(sums[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody reads operands any more, and no copy is on its way
  epilogue.begin(smem.epilogue);
#pragma unroll
  for (int m = 0; m < kM; ++m) epilogue.add(smem.epilogue, row + 16 * m, column, sums[m]);
  __syncthreads();
  epilogue.template end<kRows>(smem.epilogue);
  __syncthreads();  // the block may go on with another tile
}

// The rows of a tile that the calling warp writes.
template <int kRows>
__device__ Segment product_rows_of_warp(int rows) {
  constexpr int kOfWarp = kRows / (kProductThreads / kWarpSize);
  const int first = static_cast<int>(threadIdx.x) / kWarpSize * kOfWarp;
  return {first, min(first + kOfWarp, rows)};
}

// Rounds the sums and writes them to rows of a matrix.
template <typename T>
struct RoundingEpilogue {
  using Smem = MatrixTile<T, kProductTile, kProductTile>;
  MatrixRows<T> out;
  int rows, columns;

  __device__ void begin(Smem&) const {}
  template <int kCount>
  __device__ void add(Smem& smem, int row, int column, const float (&sums)[kCount][4]) const {
    smem.store_accumulators(row, column, sums, {1.0f, 1.0f});
  }
  template <int kRows>
  __device__ void end(const Smem& smem) const {
    const Segment mine = product_rows_of_warp<kRows>(rows);
    smem.write_rows(out.from(mine.begin), mine.begin, mine.size(), columns);
  }
};

}  // namespace arfast
