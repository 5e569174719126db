// Tensor maps: how ptx::tensor_load and tensor_store find boxes of a tensor in global memory. A kernel takes them as
// `const __grid_constant__ CUtensorMap` parameters.
#pragma once

#include "core/ptx.cuh"
#include "core/runtime.cuh"

namespace arfast {

// A tensor of 16-bit elements, its innermost dimension first. `strides` leaves the innermost one out and is in bytes, a
// multiple of 16. Shared memory gets the box's rows (128-byte swizzled: 8 rows of 128 bytes repeat); what lies outside
// of the tensor is read as zero and not written.
struct TensorMapShape {
  const void* base;
  int rank;
  uint64_t sizes[5];
  uint64_t strides[4];
  uint32_t box[5];
  int swizzle_bytes;  // 0, 32, 64, 128; no more than it are the bytes of the box's innermost side
};

#if defined(ARFAST_EMULATED)

inline const char* make_tensor_map(CUtensorMap* map, const TensorMapShape& shape, bool) {
  return emulator::make_tensor_map(map, shape.base, 2, shape.rank, shape.sizes, shape.strides, shape.box,
                                   shape.swizzle_bytes);
}

#else

// nullptr, or the text of the error. The driver's function is asked for at run time: the library does not link libcuda.
inline const char* make_tensor_map(CUtensorMap* map, const TensorMapShape& shape, bool bf16) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return "the CUDA driver has no tensor maps";
  const CUtensorMapSwizzle swizzle = shape.swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : shape.swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : shape.swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                 : CU_TENSOR_MAP_SWIZZLE_NONE;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  cuuint64_t sizes[5], strides[4];
  for (int i = 0; i < shape.rank; ++i) sizes[i] = shape.sizes[i];
  for (int i = 0; i + 1 < shape.rank; ++i) strides[i] = shape.strides[i];
  const CUresult status =
      encode(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, shape.rank,
             const_cast<void*>(shape.base), sizes, strides, shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "the CUDA driver refuses the tensor map";
}

#endif

}  // namespace arfast
