// Argument checks, allocation and the CUDA stream: see tensor.h.
#include "binding/tensor.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <stdexcept>

namespace arfast {

#if !defined(ARFAST_EMULATED)
namespace emulated {
inline void argument(const char*, const Tensor&) {}
inline void allocated(const Tensor&) {}
}  // namespace emulated
#endif

namespace {

std::string list(std::initializer_list<int64_t> sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += size == kAny ? "*" : std::to_string(size);
  }
  return text + "]";
}

// With pages of 4 KiB the first touch of a large output costs about 0.7 us per page. Only whole huge pages inside the
// allocation are advised, so neighbours on the heap are not affected.
void advise_huge_pages(const Tensor& tensor, int64_t bytes) {
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (bytes < int64_t{4} << 20 || !tensor.is_cpu()) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

int64_t item_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 4;
  }
}

}  // namespace

void fail(const char* op, const char* argument, const std::string& rule, const std::string& got) {
  throw std::runtime_error(std::string(op) + ": " + argument + " must " + rule + ", got " + got);
}

std::string to_string(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (dim > 0) text += ", ";
    text += std::to_string(tensor.size(dim));
  }
  return text + "]";
}

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device:") + std::to_string(tensor.get_device_index());
}

void check_shape(const char* op, const char* argument, const Tensor& tensor, const char* names,
                 std::initializer_list<int64_t> sizes) {
  bool equal = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t dim = 0; equal && dim < tensor.dim(); ++dim) {
    const int64_t size = sizes.begin()[dim];
    equal = size == kAny || tensor.size(dim) == size;
  }
  if (!equal) fail(op, argument, std::string("have shape ") + names + " = " + list(sizes), shape_of(tensor));
  emulated::argument(argument, tensor);
}

void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) fail(op, argument, "be " + dtype_name(dtype), dtype_name(tensor.scalar_type()));
}

void check_same_dtype(const char* op, const char* argument, const Tensor& tensor, const char* other_name,
                      const Tensor& other) {
  if (tensor.scalar_type() != other.scalar_type()) {
    fail(op, argument, std::string("have the dtype of ") + other_name + " (" + dtype_name(other.scalar_type()) + ")",
         dtype_name(tensor.scalar_type()));
  }
}

void check_same_device(const char* op, const char* argument, const Tensor& tensor, const char* other_name,
                       const Tensor& other) {
  if (device_of(tensor) != device_of(other)) {
    fail(op, argument, std::string("be on the device of ") + other_name + " (" + device_of(other) + ")",
         device_of(tensor));
  }
}

void check_range(const char* op, const char* argument, double value, bool inside, const char* rule) {
  if (!inside) fail(op, argument, rule, to_string(value));
}

DType float_dtype(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      if (on_cpu(tensor)) return DType::kFloat64;
      fail(op, argument, "be float32, bfloat16 or float16 on a GPU", "float64");
    default:
      fail(op, argument, "be float32, bfloat16, float16 or float64", dtype_name(tensor.scalar_type()));
  }
}

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype, Pages pages) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  if (pages == Pages::kHuge) advise_huge_pages(tensor, tensor.numel() * item_size(dtype));
  emulated::allocated(tensor);
  return tensor;
}

Tensor new_zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_zeros(like, sizes, dtype);
  emulated::allocated(tensor);
  return tensor;
}

Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1) return tensor;
  return to_contiguous(tensor);
}

Tensor to_contiguous(const Tensor& tensor) {
  Tensor dense = torch::stable::contiguous(tensor);
  emulated::allocated(dense);
  return dense;
}

Tensor checked_dense(const char* op, const char* argument, const Tensor& tensor, const char* names,
                     std::initializer_list<int64_t> sizes, ScalarType dtype, const char* other_name,
                     const Tensor& other) {
  check_shape(op, argument, tensor, names, sizes);
  check_dtype(op, argument, tensor, dtype);
  check_same_device(op, argument, tensor, other_name, other);
  return to_contiguous(tensor);
}

void check_entry(const char* op, const char* argument, int32_t value, int64_t limit, int64_t row, int64_t column) {
  if (value >= 0 && value < limit) return;
  fail(op, argument, "be in [0, " + std::to_string(limit) + ")",
       std::to_string(value) + " at [" + std::to_string(row) + ", " + std::to_string(column) + "]");
}

HeadsView view_of(const Tensor& tensor) {
  const bool packed = tensor.dim() == 3;
  return {tensor.data_ptr(), packed ? 0 : tensor.stride(0), tensor.stride(-3), tensor.stride(-2)};
}

#if defined(ARFAST_EMULATED)

CudaScope::CudaScope(const char* op, const Tensor&) : op_(op), stream_(nullptr) {}

void CudaScope::check(const char* error) const {
  emulated::launched();
  if (error != nullptr) throw std::runtime_error(std::string(op_) + ": " + error);
}

#else

CudaScope::CudaScope(const char* op, const Tensor& tensor)
    : op_(op), guard_(tensor.get_device_index()), stream_(nullptr) {
  // Looked up at run time, so that one library loads where torch has no CUDA. The symbol is not in the default scope.
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (get_stream == nullptr || get_stream(tensor.get_device_index(), &stream_) != 0) {
    throw std::runtime_error(std::string(op) + ": torch's current CUDA stream is not available");
  }
}

void CudaScope::check(const char* error) const {
  if (error != nullptr) throw std::runtime_error(std::string(op_) + ": launch failed: " + error);
}

#endif

}  // namespace arfast
