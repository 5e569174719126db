// Elementwise kernels: the threads of a grid share out the vectors of a matrix.
#pragma once

#include <cstdint>

#include "core/runtime.cuh"
#include "core/vector.cuh"

namespace arfast {

constexpr int kElementwiseThreads = 256;

// A grid that fills the GPU about four times over: its threads go on with the next vectors.
template <typename T>
LaunchShape elementwise_shape(int64_t rows, int64_t size) {
  const int64_t wanted = (rows * vectors_of<T>(size) + kElementwiseThreads - 1) / kElementwiseThreads;
  const int64_t most = int64_t{32} * device_multiprocessors();
  return {dim3(static_cast<unsigned>(wanted < most ? wanted : most)), dim3(kElementwiseThreads)};
}

// f(row, column of its first element) for every vector of `rows` rows of `size` elements.
template <typename T, typename F>
__device__ void for_each_vector(int64_t rows, int64_t size, const F& f) {
  const int64_t vectors = vectors_of<T>(size), step = int64_t{gridDim.x} * kElementwiseThreads;
  for (int64_t i = int64_t{blockIdx.x} * kElementwiseThreads + threadIdx.x; i < rows * vectors; i += step) {
    f(i / vectors, i % vectors * Vector16<T>::kSize);
  }
}

}  // namespace arfast
