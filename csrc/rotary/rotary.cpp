// Binding of rotary: schema, checks, allocation and the choice of the implementation.
#include "rotary/rotary.h"

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "rotary";

Tensor rotary(Tensor x, Tensor cos, Tensor sin, bool inverse) {
  check_shape(kOp, "x", x, "[N, H, D]", {kAny, kAny, kAny});
  const DType dtype = float_dtype(kOp, "x", x);
  const int64_t rows = x.size(0), heads = x.size(1), size = x.size(2);
  if (size % 2 != 0) fail(kOp, "x", "have an even head dimension", shape_of(x));
  check_shape(kOp, "cos", cos, "[P, D / 2]", {kAny, size / 2});
  check_shape(kOp, "sin", sin, "[P, D / 2]", {cos.size(0), size / 2});
  for (const auto& [name, table] : {std::pair{"cos", &cos}, std::pair{"sin", &sin}}) {
    check_dtype(kOp, name, *table, ScalarType::Float);
    check_same_device(kOp, name, *table, "x", x);
  }
  if (rows > 0 && (cos.size(0) == 0 || rows % cos.size(0) != 0)) {
    fail(kOp, "cos", "have rows that divide the " + std::to_string(rows) + " rows of x", std::to_string(cos.size(0)));
  }
  x = with_dense_rows(x);
  cos = to_contiguous(cos);
  sin = to_contiguous(sin);
  Tensor out = new_empty(x, {rows, heads, size}, x.scalar_type());
  if (out.numel() == 0) return out;
  const RotaryParams params{
      .dtype = dtype,
      .num_rows = rows,
      .num_heads = heads,
      .head_dim = size,
      .table_rows = cos.size(0),
      .x = x.data_ptr(),
      .x_row_stride = x.stride(0),
      .x_head_stride = x.stride(1),
      .cos = static_cast<const float*>(cos.data_ptr()),
      .sin = static_cast<const float*>(sin.data_ptr()),
      .inverse = inverse,
      .out = out.data_ptr(),
  };
  run(kOp, x, params, rotary_cpu, rotary_cuda);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) { m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("rotary", TORCH_BOX(&rotary)); }
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) { m.impl("rotary", TORCH_BOX(&rotary)); }

}  // namespace arfast
