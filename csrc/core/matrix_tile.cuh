// Parts of matrices of 16-bit elements in shared memory, and products of them by mma.sync.
#pragma once

#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "core/vector.cuh"

namespace arfast {

// Rows of a matrix, dense along a row.
template <typename T>
struct MatrixRows {
  const T* first;
  int stride;
  __device__ const T* at(int row) const { return first + int64_t{row} * stride; }
  __device__ MatrixRows from(int row) const { return {at(row), stride}; }
};

// A part of a matrix in shared memory. The chunks of 16 bytes of a row are permuted by its number, within groups of 8,
// so that neither a row nor a column of chunks meets one bank twice.
template <typename T, int kRows, int kColumns>
struct alignas(1024) MatrixTile {
  using Element = T;
  static constexpr int kHeight = kRows, kWidth = kColumns;
  static constexpr int kChunk = 8;                          // elements
  static constexpr int kPitch = (kColumns + 63) / 64 * 64;  // elements
  static constexpr int kChunks = kColumns / kChunk, kRowChunks = kPitch / kChunk;
  T elements[kRows * kPitch];

  __device__ static int place(int row, int chunk) { return row * kPitch + (chunk ^ row % 8) * kChunk; }

  // Starts to copy `rows` rows of columns elements; the others become zero: weights of 0 do not protect from NaN.
  template <int kThreads>
  __device__ void load(const MatrixRows<T>& source, int rows, int columns) {
    constexpr int kStep = kThreads / kRowChunks;  // rows at a time
    static_assert(kRows % kStep == 0);
    const int chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
    if (chunk >= kChunks) return;
    const int size = max(0, min(columns - chunk * kChunk, kChunk));
    const bool aligned = is_aligned16(source.first) && source.stride % kChunk == 0;
    const T* from = source.first + int64_t{first} * source.stride + chunk * kChunk;
#pragma unroll 1
    for (int row = first; row < kRows; row += kStep, from += int64_t{kStep} * source.stride) {
      copy_chunk(row, chunk, from, row < rows ? size : 0, aligned, source.first);
    }
  }

  // The same with rows that lie anywhere: row_at(row) is where.
  template <int kThreads, typename F>
  __device__ void gather(const F& row_at, int rows, int columns) {
    constexpr int kStep = kThreads / kRowChunks;
    const int chunk = threadIdx.x % kRowChunks;
    if (chunk >= kChunks) return;
    const int size = max(0, min(columns - chunk * kChunk, kChunk));
    const T* any = row_at(0);
#pragma unroll 4
    for (int row = threadIdx.x / kRowChunks; row < kRows; row += kStep) {
      const T* from = row < rows ? row_at(row) + chunk * kChunk : any;
      copy_chunk(row, chunk, from, row < rows ? size : 0, is_aligned16(from), any);
    }
  }

  // Starts to copy the first `size` elements of a chunk, zeros after them. `any` is some address in the same tensor.
  __device__ void copy_chunk(int row, int chunk, const T* from, int size, bool aligned, const T* any) {
    T* to = elements + place(row, chunk);
    if (aligned) {
      const int bytes = size * static_cast<int>(sizeof(T));
      ptx::cp_async16(ptx::shared_address(to), size > 0 ? from : any, bytes);
    } else {
      *reinterpret_cast<Vector16<T>*>(to) = first_elements(from, size);
    }
  }

  // Where the calling lane reads its row of each fragment of 16 x 16 elements that begins in `row` and column 0.
  // Another one lies `rows` rows below and `k` times 16 columns to the right at fragment(address, rows, k).
  __device__ uint32_t lane_address(int row, int chunk) const {
    return ptx::shared_address(elements + place(row, chunk));
  }
  __device__ uint32_t a_address(int row) const {
    const int lane = threadIdx.x % kWarpSize;
    return lane_address(row + lane % 16, lane / 16);
  }
  // For b operands of the transposed matrix: columns [row, row + 8), then [row + 8, row + 16).
  __device__ uint32_t b_address(int row) const {
    const int lane = threadIdx.x % kWarpSize;
    return lane_address(row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  // For ldmatrix with transposition, as an a operand of the transposed matrix: its rows are columns [0, 16).
  __device__ uint32_t transposed_a_address(int row) const { return b_address(row); }
  // For ldmatrix with transposition, as b operands of the matrix itself: its columns [0, 8), then [8, 16).
  __device__ uint32_t transposed_b_address(int row) const { return a_address(row); }

  __device__ static uint32_t fragment(uint32_t address, int rows, int k) {
    constexpr int kElement = sizeof(T);
    return (address ^ k * 16 * kElement) + rows * kPitch * kElement;  // columns are permuted by exclusive or
  }

  // Two neighbours of a row; `column` is even.
  __device__ T* pair(int row, int column) { return elements + place(row, column / kChunk) + column % kChunk; }
  __device__ float2 load_pair(int row, int column) {
    const T* from = pair(row, column);
    return {to_float(from[0]), to_float(from[1])};
  }
  __device__ void store_pair(int row, int column, float x, float y) {
    const uint32_t bits = std::is_same_v<T, BFloat16> ? ptx::pack_bf16x2(x, y) : ptx::pack_f16x2(x, y);
    *reinterpret_cast<uint32_t*>(pair(row, column)) = bits;
  }

  // The accumulators of 16 rows, times the factors of rows 0 to 7 and 8 to 15 of a thread, from `row` and `column` on.
  template <int kCount>
  __device__ void store_accumulators(int row, int column, const float (&sums)[kCount][4], const float (&factors)[2]) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        store_pair(row + 8 * half + lane / 4, column + 8 * n + 2 * (lane % 4), sums[n][2 * half] * factors[half],
                   sums[n][2 * half + 1] * factors[half]);
      }
    }
  }

  // Rows [first, first + rows) to `target`, by one warp.
  __device__ void write_rows(const MatrixRows<T>& target, int first, int rows, int columns) const {
    const bool aligned = is_aligned16(target.first) && target.stride % kChunk == 0;
    for (int i = threadIdx.x % kWarpSize; i < rows * kChunks; i += kWarpSize) {
      const int row = i / kChunks, chunk = i % kChunks, size = min(columns - chunk * kChunk, kChunk);
      const Vector16<T> vector = *reinterpret_cast<const Vector16<T>*>(elements + place(first + row, chunk));
      T* to = const_cast<T*>(target.from(row).first) + chunk * kChunk;
      if (aligned && size == kChunk) {
        *reinterpret_cast<Vector16<T>*>(to) = vector;
        continue;
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j < size) to[j] = vector.elements[j];
      }
    }
  }
};

// The a operand of a product over 16 columns from accumulators: two tiles of 8 columns side by side.
template <typename T>
__device__ inline void fragment_from_accumulators(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  const auto pack = [](float x, float y) {
    return std::is_same_v<T, BFloat16> ? ptx::pack_bf16x2(x, y) : ptx::pack_f16x2(x, y);
  };
  a[0] = pack(low[0], low[1]);
  a[1] = pack(low[2], low[3]);
  a[2] = pack(high[0], high[1]);
  a[3] = pack(high[2], high[3]);
}

// acc = a b^T: kRowTiles times 16 rows of a tile by kColumns times 8 rows of another. Addresses: a_address, b_address.
template <typename A, typename B, int kRowTiles, int kColumns>
__device__ inline void multiply_rows(uint32_t a_rows, uint32_t b_rows, float (&acc)[kRowTiles][kColumns][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColumns * 4; ++i) acc[i / 4 / kColumns][i / 4 % kColumns][i % 4] = 0;
#pragma unroll 2  // more would hold more addresses than there are registers
  for (int k = 0; k < A::kWidth / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) ptx::ldmatrix_x4(a[m], A::fragment(a_rows, 16 * m, k));
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, B::fragment(b_rows, 16 * n, k));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::mma_m16n8k16<typename A::Element>(acc[m][2 * n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<typename A::Element>(acc[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}
template <typename A, typename B, int kColumns>
__device__ inline void multiply_rows(uint32_t a_rows, uint32_t b_rows, float (&acc)[kColumns][4]) {
  multiply_rows<A, B>(a_rows, b_rows, reinterpret_cast<float (&)[1][kColumns][4]>(acc));
}

// acc += a b over 16 rows of a tile, from 16 * k on: a is kRowTiles times 16 rows, in registers. The columns of the
// accumulators are pairs of 8, the next pair 16 * kColumnStep to the right (a power of 2). Address:
// transposed_b_address.
template <typename B, int kColumnStep, int kRowTiles, int kColumns>
__device__ inline void multiply_16_rows(const uint32_t (&a)[kRowTiles][4], uint32_t b_address, int k,
                                        float (&acc)[kRowTiles][kColumns][4]) {
#pragma unroll
  for (int n = 0; n < kColumns / 2; ++n) {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, B::fragment(b_address, 16 * k, kColumnStep * n));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      ptx::mma_m16n8k16<typename B::Element>(acc[m][2 * n], a[m], b[0], b[1]);
      ptx::mma_m16n8k16<typename B::Element>(acc[m][2 * n + 1], a[m], b[2], b[3]);
    }
  }
}

// acc += weights b: the weights in registers, by all rows of a tile.
template <typename B, int kRowTiles, int kDepth, int kColumns>
__device__ inline void multiply_columns(const uint32_t (&weights)[kDepth][kRowTiles][4], uint32_t b_rows,
                                        float (&acc)[kRowTiles][kColumns][4]) {
#pragma unroll
  for (int k = 0; k < kDepth; ++k) multiply_16_rows<B, 1>(weights[k], b_rows, k, acc);
}

// acc += a b: kRowTiles times 16 rows of a tile, or columns of a transposed one, by columns of another. Addresses:
// a_address or transposed_a_address, transposed_b_address.
template <typename A, bool kTransposeA, typename B, int kColumnStep, int kRowTiles, int kColumns>
__device__ inline void multiply_add(uint32_t a_address, uint32_t b_address, float (&acc)[kRowTiles][kColumns][4]) {
  constexpr int kUnroll = kRowTiles * kColumns < 16 ? 2 : 1;  // more would hold more addresses than there are registers
#pragma unroll kUnroll
  for (int k = 0; k < B::kHeight / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if constexpr (kTransposeA) {
        ptx::ldmatrix_x4_trans(a[m], A::fragment(a_address, 16 * k, m));
      } else {
        ptx::ldmatrix_x4(a[m], A::fragment(a_address, 16 * m, k));
      }
    }
    multiply_16_rows<B, kColumnStep>(a, b_address, k, acc);
  }
}

}  // namespace arfast
