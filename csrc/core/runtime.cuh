// Launching kernels: the only place with CUDA's launch call, so that errors, dynamic shared memory, clusters and
// streams are handled once. ARFAST_EMULATED is the build for the tests' emulated GPU (tests/emulator).
#pragma once

#if defined(ARFAST_EMULATED)
#include <tuple>

#include "emulator/device.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>

namespace arfast {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks per cluster, along x
  // May begin before the kernel before it on the stream ends (sm_90): see ptx::grid_dependency_wait.
  bool programmatic = false;
};

#if defined(ARFAST_EMULATED)

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchShape& shape, void*, const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  const auto run_thread = [](void* context) {
    Call& call = *static_cast<Call*>(context);
    std::apply(call.kernel, call.arguments);
  };
  return emulator::run({shape.grid, shape.block, shape.shared_bytes, shape.cluster, shape.programmatic}, run_thread,
                       &call, sizeof(call));
}

// The block's dynamic shared memory, seen as one struct that describes its whole layout.
template <typename Storage>
__device__ inline Storage& shared_storage() {
  return *static_cast<Storage*>(emulator::shared_memory());
}

inline int device_multiprocessors() { return emulator::multiprocessors(); }

template <typename... Parameters>
int kernel_capability(void (*)(Parameters...)) {
  return emulator::capability();
}

#else

// 0 without a device.
inline int device_multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

// The compute capability whose instructions the kernel uses on the current device, 80 for 8.0. A device newer than all
// that the library was compiled for runs code for an older one.
template <typename... Parameters>
int kernel_capability(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? attributes.ptxVersion : 0;
}

// Runs `kernel(arguments...)`; nullptr, or the text of the error. More than 48 KiB of shared memory, and clusters of
// more than 8 blocks, are asked for explicitly.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                   const Arguments&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > 48 * 1024) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
  }
  if (error == cudaSuccess && shape.cluster > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (shape.programmatic && kernel_capability(kernel) >= 90) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The block's dynamic shared memory, seen as one struct that describes its whole layout.
template <typename Storage>
__device__ inline Storage& shared_storage() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<Storage*>(bytes);
}

#endif

}  // namespace arfast
