// A row of a matrix as aligned 16-byte vectors, wherever it begins and however long it is.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/ptx.cuh"
#include "core/vector.cuh"

namespace arfast {

// The aligned vectors that cover the `size` elements at `row`. The first and the last one may stick out: there, loads
// fill up with -inf and stores leave memory alone.
template <typename T>
class RowOf {
  using Element = std::remove_const_t<T>;
  using Vector = Vector16<Element>;

 public:
  __device__ RowOf(T* row, int64_t size) : row_(row), size_(size) {
    before_ = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Element));
  }
  __device__ int64_t size() const { return size_; }
  __device__ int64_t num_vectors() const { return (before_ + size_ + Vector::kSize - 1) / Vector::kSize; }
  // Of the first element of vector j; it may be negative.
  __device__ int64_t column(int64_t j) const { return j * Vector::kSize - before_; }
  __device__ bool whole(int64_t j) const { return covers(column(j)); }
  __device__ T* vector(int64_t j) const { return row_ + column(j); }

  __device__ Vector load(int64_t j) const {
    const int64_t first = column(j);
    if (covers(first)) return *reinterpret_cast<const Vector*>(row_ + first);
    return gather(first, -INFINITY);
  }

  // The elements from column `first` on, which may be a column of another row's vector; `outside` beside the row.
  __device__ Vector at(int64_t first, float outside) const {
    if (covers(first) && is_aligned16(row_ + first)) return *reinterpret_cast<const Vector*>(row_ + first);
    return gather(first, outside);
  }

  // The same as bits, for from_bits.
  __device__ uint4 bits_at(int64_t first, float outside) const {
    if (covers(first) && is_aligned16(row_ + first)) return *reinterpret_cast<const uint4*>(row_ + first);
    return to_bits(gather(first, outside));
  }

  // A vector whose first element belongs into column `first`, past the caches: it is not read again soon. Another row's
  // vectors may lie differently.
  __device__ void store(int64_t first, const Vector& vector) const {
    if (covers(first) && is_aligned16(row_ + first)) {
      return ptx::store_streaming(reinterpret_cast<uint4*>(row_ + first), reinterpret_cast<const uint4&>(vector));
    }
    scatter(first, vector);
  }

  // The same through the caches, for what the next kernel reads.
  __device__ void store_cached(int64_t first, const Vector& vector) const {
    if (covers(first) && is_aligned16(row_ + first)) {
      *reinterpret_cast<Vector*>(row_ + first) = vector;
      return;
    }
    scatter(first, vector);
  }

 private:
  __device__ bool covers(int64_t first) const { return first >= 0 && first + Vector::kSize <= size_; }

  __device__ Vector gather(int64_t first, float outside) const {
    Vector vector = filled_with<Element>(outside);
#pragma unroll
    for (int i = 0; i < Vector::kSize; ++i) {
      if (first + i >= 0 && first + i < size_) vector.elements[i] = row_[first + i];
    }
    return vector;
  }

  __device__ void scatter(int64_t first, const Vector& vector) const {
#pragma unroll
    for (int i = 0; i < Vector::kSize; ++i) {
      if (first + i >= 0 && first + i < size_) row_[first + i] = vector.elements[i];
    }
  }

  T* row_;
  int64_t size_;
  int before_;  // elements of the first vector that lie before the row
};

// Row `row` of a matrix whose rows are `stride` elements apart: row_of<const T> of one that is read.
template <typename T>
__device__ RowOf<T> row_of(std::conditional_t<std::is_const_v<T>, const void*, void*> matrix, int64_t row,
                           int64_t stride, int64_t size) {
  return RowOf<T>(static_cast<T*>(matrix) + row * stride, size);
}

// kCount floats from column `first` on, zero beside the row: those that go with one vector of 16-bit elements or
// floats.
template <typename T, int kCount>
__device__ void load_floats(const RowOf<T>& row, int64_t first, float (&values)[kCount]) {
  constexpr int kSize = Vector16<float>::kSize;
#pragma unroll
  for (int i = 0; i < kCount; i += kSize) {
    const Vector16<float> vector = row.at(first + i, 0);
#pragma unroll
    for (int k = 0; k < kSize; ++k) values[i + k] = vector.elements[k];
  }
}

template <int kCount>
__device__ void store_floats(const RowOf<float>& row, int64_t first, const float (&values)[kCount]) {
  constexpr int kSize = Vector16<float>::kSize;
#pragma unroll
  for (int i = 0; i < kCount; i += kSize) {
    Vector16<float> vector;
#pragma unroll
    for (int k = 0; k < kSize; ++k) vector.elements[k] = values[i + k];
    row.store_cached(first + i, vector);
  }
}

}  // namespace arfast
