// The CUDA side of a contract.
#pragma once

#include <type_traits>

#include "core/dtype.h"

namespace arfast {

// Declares `const char* name_cuda(const Params&, void* stream)`, which launches on a cudaStream_t and returns nullptr
// or the text of an error. A build without the kernels says so.
#if defined(ARFAST_WITH_CUDA) || defined(__CUDACC__)
#define ARFAST_CUDA_FUNCTION(name, Params) const char* name##_cuda(const Params& params, void* stream);
#else
#define ARFAST_CUDA_FUNCTION(name, Params) \
  inline const char* name##_cuda(const Params&, void*) { return "arfast was built without CUDA kernels"; }
#endif

// dispatch_dtype for launchers, whose result it returns. Bindings refuse float64 on a GPU.
template <typename F>
const char* dispatch_gpu_dtype(DType dtype, const F& f) {
  return dispatch_dtype(dtype, [&](auto tag) -> const char* {
    if constexpr (std::is_same_v<decltype(tag), TypeTag<double>>) {
      return "dtype must be float32, bfloat16 or float16";
    } else {
      return f(tag);
    }
  });
}

// The same where only the tensor cores' 16-bit elements are served.
template <typename F>
const char* dispatch_tensor_core_dtype(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) return f(TypeTag<BFloat16>{});
  if (dtype == DType::kFloat16) return f(TypeTag<Float16>{});
  return "dtype must be bfloat16 or float16";
}

}  // namespace arfast
