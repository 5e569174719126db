// Binding of cross_entropy: schema, checks, allocation, reduction and the choice of the implementation.
#include "cross_entropy/cross_entropy.h"

#include <tuple>

#include "binding/tensor.h"
#include "cross_entropy/cross_entropy_arguments.h"

namespace arfast {
namespace {

constexpr const char* kOp = "cross_entropy";

struct CheckedLogits {
  DType dtype;
  Tensor logits;
};

CheckedLogits check_logits(const Tensor& logits) {
  check_shape(kOp, "logits", logits, "[N, V]", {kAny, kAny});
  return {float_dtype(kOp, "logits", logits), with_dense_rows(logits)};
}

void run(const CrossEntropyParams& params, const Tensor& logits) {
  if (params.num_rows == 0) return;
  if (!logits.is_cpu()) fail(kOp, "logits", "be on the CPU", device_of(logits));
  cross_entropy_cpu(params);
}

// The loss and, when asked for, its gradient for an upstream gradient of 1, written to `dlogits`.
std::tuple<Tensor, Tensor> forward(const Tensor& logits, DType dtype, CrossEntropyArguments& arguments,
                                   Tensor* dlogits) {
  const ScalarType wide = statistics_dtype(dtype);
  Tensor statistics = new_empty(logits, {logits.size(0), 2}, wide);
  CrossEntropyLosses losses(logits, dtype);
  CrossEntropyParams params = arguments.params(dtype, logits);
  params.ce = losses.ce();
  params.z = losses.z();
  params.statistics = static_cast<float*>(statistics.data_ptr());
  if (dlogits != nullptr) {
    params.dlogits = dlogits->data_ptr();
    params.dlogits_stride = dlogits->stride(0);
  }
  run(params, logits);
  return {losses.reduce(arguments), statistics};
}

// -> (loss [] or [N], statistics [N, 2], dlogits [N, V] for an upstream gradient of 1, or [0, V])
std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor targets, std::optional<Tensor> weight,
                                                         int64_t ignore_index, double label_smoothing, double z_loss,
                                                         double softcap, int64_t reduction,
                                                         std::optional<double> num_items, bool with_gradient) {
  auto [dtype, dense] = check_logits(logits);
  CrossEntropyArguments arguments(kOp, dense.size(0), dense.size(1), dense, targets, weight, ignore_index,
                                  label_smoothing, z_loss, softcap, reduction, num_items);
  Tensor dlogits = new_empty(dense, {with_gradient ? dense.size(0) : 0, dense.size(1)}, dense.scalar_type());
  auto [loss, statistics] = forward(dense, dtype, arguments, with_gradient ? &dlogits : nullptr);
  return {loss, statistics, dlogits};
}

// The same with the gradient written over the logits.
std::tuple<Tensor, Tensor> cross_entropy_forward_(Tensor logits, Tensor targets, std::optional<Tensor> weight,
                                                  int64_t ignore_index, double label_smoothing, double z_loss,
                                                  double softcap, int64_t reduction, std::optional<double> num_items) {
  auto [dtype, dense] = check_logits(logits);
  if (dense.data_ptr() != logits.data_ptr()) {
    fail(kOp, "logits", "have a dense last dimension for inplace=True", "stride " + std::to_string(logits.stride(1)));
  }
  if (logits.size(0) > 1 && logits.stride(0) < logits.size(1)) {
    fail(kOp, "logits", "not overlap itself for inplace=True", "row stride " + std::to_string(logits.stride(0)));
  }
  CrossEntropyArguments arguments(kOp, logits.size(0), logits.size(1), logits, targets, weight, ignore_index,
                                  label_smoothing, z_loss, softcap, reduction, num_items);
  return forward(logits, dtype, arguments, &logits);
}

// The gradient for an upstream gradient per row; statistics are what the forward pass returned.
Tensor cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, std::optional<Tensor> weight,
                              Tensor statistics, int64_t ignore_index, double label_smoothing, double z_loss,
                              double softcap) {
  auto [dtype, dense] = check_logits(logits);
  CrossEntropyArguments arguments(kOp, dense.size(0), dense.size(1), dense, targets, weight, ignore_index,
                                  label_smoothing, z_loss, softcap, kReductionNone, std::nullopt);
  check_shape(kOp, "dloss", dloss, "[N]", {dense.size(0)});
  check_shape(kOp, "statistics", statistics, "[N, 2]", {dense.size(0), 2});
  for (const auto& [name, tensor] : {std::pair{"dloss", &dloss}, std::pair{"statistics", &statistics}}) {
    check_dtype(kOp, name, *tensor, statistics_dtype(dtype));
    check_same_device(kOp, name, *tensor, "logits", dense);
  }
  dloss = torch::stable::contiguous(dloss);
  statistics = torch::stable::contiguous(statistics);
  Tensor dlogits = new_empty(dense, {dense.size(0), dense.size(1)}, dense.scalar_type());
  CrossEntropyParams params = arguments.params(dtype, dense);
  params.row_scale = static_cast<const float*>(dloss.data_ptr());
  params.statistics = static_cast<float*>(statistics.data_ptr());
  params.dlogits = dlogits.data_ptr();
  params.dlogits_stride = dlogits.stride(0);
  run(params, dense);
  return dlogits;
}

// gradient *= scale, at no cost for the usual upstream gradient of exactly 1.
void scale_gradient_(Tensor gradient, Tensor scale) {
  check_shape(kOp, "scale", scale, "[]", {});
  if (scale.is_cpu() && scale.scalar_type() == ScalarType::Float && *static_cast<float*>(scale.data_ptr()) == 1.0f)
    return;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(gradient), torch::stable::detail::from(scale)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, float label_smoothing, "
      "float z_loss, float softcap, int reduction, float? num_items, bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_forward_(Tensor(a!) logits, Tensor targets, Tensor? weight, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, int reduction, float? num_items) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, Tensor? weight, Tensor statistics, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap) -> Tensor");
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor scale) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_forward_", TORCH_BOX(&cross_entropy_forward_));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_));
}

}  // namespace arfast
