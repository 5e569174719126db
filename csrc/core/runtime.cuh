// Launching kernels: the only place with CUDA's launch call, so that errors, dynamic shared memory, clusters and
// streams are handled once. ARFAST_EMULATED is the build for the tests' emulated GPU (tests/emulator).
#pragma once

#if defined(ARFAST_EMULATED)
#include <tuple>

#include "emulator/device.h"
#else
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>
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

inline size_t device_shared_bytes() { return emulator::shared_bytes(); }

// One block per multiprocessor, but at least a cluster.
template <typename Kernel>
int resident_clusters(Kernel, const LaunchShape& shape) {
  if (static_cast<int>(shape.cluster) > emulator::largest_cluster()) return 0;
  const int clusters = device_multiprocessors() / static_cast<int>(shape.cluster);
  return clusters > 0 ? clusters : 1;
}

#else

// An attribute of the current device, 0 without one.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

inline int device_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// What a block may ask for.
inline size_t device_shared_bytes() {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// The compute capability whose instructions the kernel uses on the current device, 80 for 8.0. A device newer than all
// that the library was compiled for runs code for an older one.
template <typename... Parameters>
int kernel_capability(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? attributes.ptxVersion : 0;
}

// Grants a kernel the shared memory and the cluster size that it is launched with, where they are not granted to all.
template <typename Kernel>
cudaError_t allow_shape(Kernel kernel, const LaunchShape& shape) {
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > 48 * 1024) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
  }
  if (error == cudaSuccess && shape.cluster > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

// CUDA's description of a launch. It points into itself.
struct LaunchConfig : cudaLaunchConfig_t {
  cudaLaunchAttribute storage[2];

  LaunchConfig(const LaunchShape& shape, void* on_stream) : cudaLaunchConfig_t{} {
    gridDim = shape.grid;
    blockDim = shape.block;
    dynamicSmemBytes = shape.shared_bytes;
    stream = static_cast<cudaStream_t>(on_stream);
    attrs = storage;
    if (shape.cluster > 1) {
      cudaLaunchAttribute& attribute = storage[numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = shape.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (shape.programmatic) {
      cudaLaunchAttribute& attribute = storage[numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// Runs `kernel(arguments...)`; nullptr, or the text of the error.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                   const Arguments&... arguments) {
  cudaError_t error = allow_shape(kernel, shape);
  if (error == cudaSuccess) {
    LaunchShape allowed = shape;
    allowed.programmatic = shape.programmatic && kernel_capability(kernel) >= 90;
    const LaunchConfig config(allowed, stream);
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The block's dynamic shared memory, seen as one struct that describes its whole layout.
template <typename Storage>
__device__ inline Storage& shared_storage() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<Storage*>(bytes);
}

// How many clusters of `shape` the current device runs at once; 0 when it cannot run them. The driver is asked once.
template <typename Kernel>
int resident_clusters(Kernel kernel, const LaunchShape& shape) {
  int device = 0, clusters = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, unsigned>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace({device, kernel, shape.cluster}, 0);
  if (!is_new) return entry->second;
  cudaError_t error = allow_shape(kernel, shape);
  if (error == cudaSuccess && shape.cluster > 1) {
    LaunchShape one = shape;
    one.grid = dim3(shape.cluster);
    const LaunchConfig config(one, nullptr);
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  } else if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, kernel, static_cast<int>(shape.block.x),
                                                          shape.shared_bytes);
    clusters *= device_multiprocessors();
  }
  if (error == cudaSuccess) entry->second = clusters;
  cudaGetLastError();  // refused: not an error of the next launch
  return entry->second;
}

#endif

}  // namespace arfast
