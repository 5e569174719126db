// Element types that cross the contract between bindings and implementations, and the call from a run-time type to a
// template.
#pragma once

#include <cstdint>

namespace arfast {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Storage of 16-bit floats. Arithmetic happens in float: see simd.h on the CPU and vector.cuh on the GPU.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct TypeTag {
  using type = T;
};

// f(TypeTag<T>{}) with the element type of `dtype`. A binding checks the dtype before; the default is
// unreachable.
template <typename F>
auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kBFloat16:
      return f(TypeTag<BFloat16>{});
    case DType::kFloat16:
      return f(TypeTag<Float16>{});
    case DType::kFloat64:
      return f(TypeTag<double>{});
  }
  __builtin_unreachable();
}

}  // namespace arfast
