// Binding of grouped_mm: schema, checks, allocation and the choice of the implementation.
#include "grouped_mm/grouped_mm.h"

#include "binding/matmul.h"
#include "binding/routing.h"
#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "grouped_mm";

Matrix matrix_of(const Tensor& tensor, int64_t row_dim) {
  return {tensor.data_ptr(), tensor.size(row_dim), tensor.size(row_dim + 1), tensor.stride(row_dim),
          tensor.stride(row_dim + 1)};
}

Tensor checked_offsets(const Tensor& offsets, const Tensor& a) {
  const Tensor dense = checked_integers(kOp, "offsets", offsets, "[E + 1]", {kAny}, "a", a);
  check(dense.size(0) >= 1, kOp, "offsets", "have shape [E + 1]", "[0]");
  if (on_cpu(a)) check_offsets(kOp, dense, a.size(0));  // a GPU would have to be waited for
  return dense;
}

// -> out [M, N]
Tensor grouped_mm(Tensor a, Tensor b, Tensor offsets) {
  check_shape(kOp, "a", a, "[M, K]", {kAny, kAny});
  const DType dtype = float_dtype(kOp, "a", a);
  offsets = checked_offsets(offsets, a);
  check_shape(kOp, "b", b, "[E, K, N]", {offsets.size(0) - 1, a.size(1), kAny});
  check_same_dtype(kOp, "b", b, "a", a);
  check_same_device(kOp, "b", b, "a", a);
  Tensor out = new_empty(a, {a.size(0), b.size(2)}, a.scalar_type());
  if (!on_cpu(a)) {
    a = with_dense_rows(a);
    if (b.stride(1) != 1) b = with_dense_rows(b);
  }
  const GroupedMmParams params{
      .dtype = dtype,
      .num_groups = b.size(0),
      .offsets = static_cast<const int32_t*>(offsets.data_ptr()),
      .a = matrix_of(a, 0),
      .b = matrix_of(b, 1),
      .b_group_stride = b.stride(0),
      .out = matrix_of(out, 0),
      .matmul = fastest_matmul,
  };
  if (out.numel() > 0) run(kOp, a, params, grouped_mm_cpu, grouped_mm_cuda);
  return out;
}

// -> out [E, K, N] with out[e] = a[rows of e]^T b[rows of e]: the gradient of grouped_mm's b
Tensor grouped_mm_transposed(Tensor a, Tensor b, Tensor offsets) {
  check_shape(kOp, "a", a, "[M, K]", {kAny, kAny});
  const DType dtype = float_dtype(kOp, "a", a);
  check_shape(kOp, "b", b, "[M, N]", {a.size(0), kAny});
  check_same_dtype(kOp, "b", b, "a", a);
  check_same_device(kOp, "b", b, "a", a);
  offsets = checked_offsets(offsets, a);
  Tensor out = new_empty(a, {offsets.size(0) - 1, a.size(1), b.size(1)}, a.scalar_type());
  if (!on_cpu(a)) {
    a = with_dense_rows(a);
    b = with_dense_rows(b);
  }
  const GroupedMmTransposedParams params{
      .dtype = dtype,
      .num_groups = out.size(0),
      .offsets = static_cast<const int32_t*>(offsets.data_ptr()),
      .a = matrix_of(a, 0),
      .b = matrix_of(b, 0),
      .out = dense_matrix(out.data_ptr(), a.size(1), b.size(1)),
      .matmul = fastest_matmul,
  };
  if (out.numel() > 0) run(kOp, a, params, grouped_mm_transposed_cpu, grouped_mm_transposed_cuda);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def("grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor");
  m.def("grouped_mm_transposed(Tensor a, Tensor b, Tensor offsets) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm));
  m.impl("grouped_mm_transposed", TORCH_BOX(&grouped_mm_transposed));
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) {
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm));
  m.impl("grouped_mm_transposed", TORCH_BOX(&grouped_mm_transposed));
}

}  // namespace arfast
