// Which memory the kernels of an op may access: that of the tensors which its binding checks and allocates.
#include <vector>

#include "binding/tensor.h"
#include "emulator/calls.h"

namespace arfast::emulated {
namespace {

struct Call {
  std::vector<Tensor> tensors;  // their memory must not become another tensor's while it is registered
  bool launched = false;
};
thread_local Call call;

size_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Short:
      return 2;
    default:
      return 1;
  }
}

void add(const std::string& name, const Tensor& tensor) {
  int64_t elements = tensor.numel() == 0 ? 0 : 1;
  for (int64_t dim = 0; elements > 0 && dim < tensor.dim(); ++dim)
    elements += (tensor.size(dim) - 1) * tensor.stride(dim);
  const size_t size = element_bytes(tensor.scalar_type());
  emulator::register_memory(tensor.data_ptr(), elements * size, size,
                            (name + " " + shape_of(tensor) + " " + dtype_name(tensor.scalar_type())).c_str());
  call.tensors.push_back(tensor);
}

}  // namespace

void argument(const char* name, const Tensor& tensor) {
  if (call.launched) {
    emulator::forget_memory();
    call = Call();
  }
  add(name, tensor);
}

void allocated(const Tensor& tensor) { add("a new tensor", tensor); }

void launched() { call.launched = true; }

}  // namespace arfast::emulated
