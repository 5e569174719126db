// Binding of rms_norm: schema, checks, allocation and the choice of the implementation.
#include "rms_norm/rms_norm.h"

#include <tuple>

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "rms_norm";

void check_weight(const Tensor& x, const Tensor& weight) {
  check_shape(kOp, "weight", weight, "[D]", {x.size(1)});
  check_same_dtype(kOp, "weight", weight, "x", x);
  check_same_device(kOp, "weight", weight, "x", x);
}

void check_like_x(const char* argument, const Tensor& tensor, const Tensor& x) {
  check_shape(kOp, argument, tensor, "[N, D]", {x.size(0), x.size(1)});
  check_same_dtype(kOp, argument, tensor, "x", x);
  check_same_device(kOp, argument, tensor, "x", x);
}

// -> (out [N, D], sum [N, D] (empty without a residual), rstd [N])
std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                                    double eps) {
  check_shape(kOp, "x", x, "[N, D]", {kAny, kAny});
  const DType dtype = float_dtype(kOp, "x", x);
  check_weight(x, weight);
  if (residual) check_like_x("residual", *residual, x);
  check_range(kOp, "eps", eps, eps >= 0 && eps < 1, "be in [0, 1)");
  x = with_dense_rows(x);
  if (residual) residual = with_dense_rows(*residual);
  weight = to_contiguous(weight);

  const int64_t rows = x.size(0), size = x.size(1);
  Tensor out = new_empty(x, {rows, size}, x.scalar_type());
  Tensor sum = new_empty(x, {residual ? rows : 0, size}, x.scalar_type());
  Tensor rstd = new_empty(x, {rows}, statistics_dtype(dtype));
  const RmsNormForwardParams params{
      .dtype = dtype,
      .num_rows = rows,
      .hidden_size = size,
      .eps = eps,
      .x = x.data_ptr(),
      .residual = pointer_or_null(residual),
      .weight = weight.data_ptr(),
      .x_stride = x.stride(0),
      .residual_stride = stride_or_zero(residual, 0),
      .out = out.data_ptr(),
      .sum = residual ? sum.data_ptr() : nullptr,
      .rstd = static_cast<float*>(rstd.data_ptr()),
  };
  if (rows == 0 || size == 0) return {out, sum, rstd};
  run(kOp, x, params, rms_norm_forward_cpu, rms_norm_forward_cuda);
  return {out, sum, rstd};
}

// -> (dx [N, D], dweight [D])
std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dout, std::optional<Tensor> dsum, Tensor x, Tensor weight,
                                             Tensor rstd) {
  check_shape(kOp, "x", x, "[N, D]", {kAny, kAny});
  const DType dtype = float_dtype(kOp, "x", x);
  check_like_x("dout", dout, x);
  if (dsum) check_like_x("dsum", *dsum, x);
  check_weight(x, weight);
  check_shape(kOp, "rstd", rstd, "[N]", {x.size(0)});
  check_dtype(kOp, "rstd", rstd, statistics_dtype(dtype));
  check_same_device(kOp, "rstd", rstd, "x", x);
  dout = with_dense_rows(dout);
  if (dsum) dsum = with_dense_rows(*dsum);
  x = with_dense_rows(x);
  weight = to_contiguous(weight);
  rstd = to_contiguous(rstd);

  const int64_t rows = x.size(0), size = x.size(1);
  Tensor dx = new_empty(x, {rows, size}, x.scalar_type());
  if (rows == 0 || size == 0) return {dx, new_zeros(x, {size}, x.scalar_type())};
  const int64_t rows_per_partial = rms_norm_rows_per_partial(rows, on_cpu(x));
  const int64_t num_partials = (rows + rows_per_partial - 1) / rows_per_partial;
  Tensor partials = new_empty(x, {num_partials, size}, statistics_dtype(dtype));
  Tensor dweight = new_empty(x, {size}, x.scalar_type());
  const RmsNormBackwardParams params{
      .dtype = dtype,
      .num_rows = rows,
      .hidden_size = size,
      .dout = dout.data_ptr(),
      .dsum = pointer_or_null(dsum),
      .x = x.data_ptr(),
      .weight = weight.data_ptr(),
      .rstd = static_cast<const float*>(rstd.data_ptr()),
      .dout_stride = dout.stride(0),
      .dsum_stride = stride_or_zero(dsum, 0),
      .x_stride = x.stride(0),
      .rows_per_partial = rows_per_partial,
      .dx = dx.data_ptr(),
      .partials = static_cast<float*>(partials.data_ptr()),
      .dweight = dweight.data_ptr(),
  };
  run(kOp, x, params, rms_norm_backward_cpu, rms_norm_backward_cuda);
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def("rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dout, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace arfast
