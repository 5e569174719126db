// What every binding needs from torch's stable C++ API: uniform argument checks, allocation, the CUDA stream.
// Errors read `<op>: <argument> must <rule>, got <actual>`.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "core/dtype.h"
#include "core/heads_view.h"

namespace arfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A size that may be anything in check_shape.
constexpr int64_t kAny = -1;

[[noreturn]] void fail(const char* op, const char* argument, const std::string& rule, const std::string& got);

inline void check(bool condition, const char* op, const char* argument, const char* rule, const std::string& got) {
  if (!condition) fail(op, argument, rule, got);
}

std::string to_string(double value);
std::string shape_of(const Tensor& tensor);
std::string dtype_name(ScalarType dtype);
std::string device_of(const Tensor& tensor);

// `names` is the shape in words, such as "[N, V]"; kAny matches every size.
void check_shape(const char* op, const char* argument, const Tensor& tensor, const char* names,
                 std::initializer_list<int64_t> sizes);
void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype);
void check_same_dtype(const char* op, const char* argument, const Tensor& tensor, const char* other_name,
                      const Tensor& other);
void check_same_device(const char* op, const char* argument, const Tensor& tensor, const char* other_name,
                       const Tensor& other);
void check_range(const char* op, const char* argument, double value, bool inside, const char* rule);

// The contract's name of a floating-point dtype: float32, bfloat16, float16, and float64 on the CPU.
DType float_dtype(const char* op, const char* argument, const Tensor& tensor);

// What statistics and sums of a tensor are kept in: float32, or float64 for float64.
inline ScalarType statistics_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType statistics_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Uninitialised tensors on the device of `like`. Large ones on the CPU ask the kernel for huge pages: touching fresh 4
// KiB pages costs more time than the arithmetic that fills them. kSmall does not ask, for what lives on while other
// work is done: a virtual machine may give free huge pages back to its host meanwhile, and then gets them at 0.4 to 0.8
// GB/s, where 4 KiB pages come at 3 to 5 (Linux 6.18, free page reporting, 2 threads, November 2026).
enum class Pages { kHuge, kSmall };
Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype,
                 Pages pages = Pages::kHuge);
Tensor new_zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// The tensor itself when its last dimension is dense, else a contiguous copy.
Tensor with_dense_rows(const Tensor& tensor);

Tensor to_contiguous(const Tensor& tensor);

// `tensor`, which must have this type and shape on the device of `other`, dense.
Tensor checked_dense(const char* op, const char* argument, const Tensor& tensor, const char* names,
                     std::initializer_list<int64_t> sizes, ScalarType dtype, const char* other_name,
                     const Tensor& other);
inline Tensor checked_integers(const char* op, const char* argument, const Tensor& tensor, const char* names,
                               std::initializer_list<int64_t> sizes, const char* other_name, const Tensor& other) {
  return checked_dense(op, argument, tensor, names, sizes, ScalarType::Int, other_name, other);
}

// An integer that is read from such a tensor must be in [0, limit).
void check_entry(const char* op, const char* argument, int32_t value, int64_t limit, int64_t row, int64_t column);

// A tensor [B, T, H, D] or [N, H, D] with dense rows.
HeadsView view_of(const Tensor& tensor);

inline int64_t stride_or_zero(const std::optional<Tensor>& tensor, int64_t dim) {
  return tensor ? tensor->stride(dim) : 0;
}
inline void* pointer_or_null(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// Whether `tensor` is for the CPU implementation; else it is on a GPU. (The emulated GPU of the tests works on tensors
// that torch sees on the CPU.)
inline bool on_cpu(const Tensor& tensor) {
#if defined(ARFAST_EMULATED)
  return false;
#else
  return tensor.is_cpu();
#endif
}

#if defined(ARFAST_EMULATED)
// The emulated GPU reports accesses to memory of no tensor of the call. Every tensor that this file checks or allocates
// is known to it, until the first check after a launch: there the next call begins. See tests/emulator/tensors.cpp.
namespace emulated {
void argument(const char* name, const Tensor& tensor);
void allocated(const Tensor& tensor);
void launched();
}  // namespace emulated
#endif

// Makes `tensor`'s GPU the current one for its lifetime, gives torch's current stream there, and turns the error string
// of a launcher (nullptr: none) into an exception.
class CudaScope {
 public:
  CudaScope(const char* op, const Tensor& tensor);
  void* stream() const { return stream_; }
  void check(const char* error) const;

 private:
  const char* op_;
#if !defined(ARFAST_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_;
};

// Runs the implementation that belongs to the device of `tensor`.
template <typename Params>
void run(const char* op, const Tensor& tensor, const Params& params, void (*cpu)(const Params&),
         const char* (*cuda)(const Params&, void* stream)) {
  if (on_cpu(tensor)) return cpu(params);
  const CudaScope scope(op, tensor);
  scope.check(cuda(params, scope.stream()));
}

}  // namespace arfast
