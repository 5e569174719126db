// Launching kernels: the only place with CUDA's launch call, so that errors, dynamic shared memory and streams are
// handled once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace arfast {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
};

// Runs `kernel(arguments...)`; nullptr, or the text of the error. More than 48 KiB of shared memory are asked for
// explicitly.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                   const Arguments&... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The block's dynamic shared memory, seen as one struct that describes its whole layout.
template <typename Storage>
__device__ inline Storage& shared_storage() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return *reinterpret_cast<Storage*>(bytes);
}

}  // namespace arfast
