// Binding of cross_entropy: schema, checks, allocation and the choice of the implementation. Options are checked in
// Python, once for this op and linear_cross_entropy.
#include "cross_entropy/cross_entropy.h"

#include <array>
#include <tuple>

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "cross_entropy";
static_assert(sizeof(CrossEntropyTotals) == 3 * sizeof(double));

// Targets and class weights, checked; `like` gives the device and the dtype of the logits.
struct Labels {
  DType dtype;
  Tensor like, targets;
  std::optional<Tensor> weight;
  int64_t vocab_size, ignore_index;

  Labels(const Tensor& logits_like, const Tensor& given_targets, const std::optional<Tensor>& given_weight,
         int64_t classes, int64_t ignored)
      : dtype(float_dtype(kOp, "logits", logits_like)),
        like(logits_like),
        targets(to_contiguous(given_targets)),
        weight(given_weight),
        vocab_size(classes),
        ignore_index(ignored) {
    check_shape(kOp, "targets", targets, "[N]", {like.size(0)});
    check_dtype(kOp, "targets", targets, ScalarType::Long);
    check_same_device(kOp, "targets", targets, "logits", like);
    if (vocab_size == 0) fail(kOp, "logits", "have at least one class", "0 classes");
    if (weight) {
      check_shape(kOp, "weight", *weight, "[V]", {vocab_size});
      check_dtype(kOp, "weight", *weight, statistics_dtype(dtype));
      check_same_device(kOp, "weight", *weight, "logits", like);
      weight = to_contiguous(*weight);
    }
    if (on_cpu(like)) check_targets();  // on a GPU looking would wait for it: such a row becomes NaN there
  }

  void check_targets() const {
    const auto* rows = static_cast<const int64_t*>(targets.data_ptr());
    for (int64_t i = 0; i < targets.size(0); ++i) {
      if (rows[i] == ignore_index || (rows[i] >= 0 && rows[i] < vocab_size)) continue;
      fail(kOp, "targets", "be in [0, " + std::to_string(vocab_size) + ") or " + std::to_string(ignore_index),
           std::to_string(rows[i]) + " at row " + std::to_string(i));
    }
  }

  Tensor totals(int64_t reduction, std::optional<double> num_items) const {
    Tensor out = new_empty(like, {3}, ScalarType::Double);
    const CrossEntropyTotalsParams params{
        .dtype = dtype,
        .num_rows = targets.size(0),
        .vocab_size = vocab_size,
        .targets = static_cast<const int64_t*>(targets.data_ptr()),
        .ignore_index = ignore_index,
        .weight = static_cast<const float*>(pointer_or_null(weight)),
        .reduction = reduction,
        .num_items = num_items.value_or(0),
        .totals = static_cast<CrossEntropyTotals*>(out.data_ptr()),
    };
    run(kOp, like, params, cross_entropy_totals_cpu, cross_entropy_totals_cuda);
    return out;
  }
};

int64_t classes_of(const Tensor& logits) {
  check_shape(kOp, "logits", logits, "[N, V]", {kAny, kAny});
  return logits.size(1);
}

struct Arguments : Labels {
  Tensor logits, totals{};
  double label_smoothing, z_loss, softcap;

  Arguments(const Tensor& given_logits, const Tensor& given_targets, const std::optional<Tensor>& given_weight,
            int64_t ignored, double smoothing, double z_loss_factor, double cap)
      : Labels(given_logits, given_targets, given_weight, classes_of(given_logits), ignored),
        logits(with_dense_rows(given_logits)),
        label_smoothing(smoothing),
        z_loss(z_loss_factor),
        softcap(cap) {}

  void set_totals(const std::optional<Tensor>& given, int64_t reduction, std::optional<double> num_items) {
    if (!given) {
      totals = Labels::totals(reduction, num_items);
      return;
    }
    check_shape(kOp, "totals", *given, "[3]", {3});
    check_dtype(kOp, "totals", *given, ScalarType::Double);
    check_same_device(kOp, "totals", *given, "logits", logits);
    totals = to_contiguous(*given);
  }

  CrossEntropyParams params(const Tensor& statistics, const Tensor* dlogits) const {
    return CrossEntropyParams{
        .dtype = dtype,
        .num_rows = logits.size(0),
        .vocab_size = logits.size(1),
        .logits = logits.data_ptr(),
        .logits_stride = logits.stride(0),
        .targets = static_cast<const int64_t*>(targets.data_ptr()),
        .ignore_index = ignore_index,
        .weight = static_cast<const float*>(pointer_or_null(weight)),
        .label_smoothing = label_smoothing,
        .z_loss = z_loss,
        .softcap = softcap,
        .totals = static_cast<const CrossEntropyTotals*>(totals.data_ptr()),
        .row_scale = nullptr,
        .ce = nullptr,
        .z = nullptr,
        .statistics = static_cast<float*>(statistics.data_ptr()),
        .dlogits = dlogits ? dlogits->data_ptr() : nullptr,
        .dlogits_stride = dlogits ? dlogits->stride(0) : 0,
    };
  }

  // -> (loss, statistics); the gradient for an upstream gradient of 1 goes to `dlogits`, when there is one.
  std::tuple<Tensor, Tensor> forward(int64_t reduction, const Tensor* dlogits) const {
    const ScalarType wide = statistics_dtype(dtype);
    const int64_t rows = logits.size(0);
    Tensor statistics = new_empty(logits, {rows, 2}, wide);
    Tensor losses = new_empty(logits, {2, rows}, wide);
    Tensor loss = reduction == kReductionNone ? new_empty(logits, {rows}, wide) : new_empty(logits, {}, wide);
    char* ce = static_cast<char*>(losses.data_ptr());
    CrossEntropyParams row_params = params(statistics, dlogits);
    row_params.ce = reinterpret_cast<float*>(ce);
    row_params.z = reinterpret_cast<float*>(ce + rows * losses.element_size());
    if (rows > 0) run(kOp, logits, row_params, cross_entropy_cpu, cross_entropy_cuda);
    const CrossEntropyReduceParams reduce_params{
        .dtype = dtype,
        .num_rows = rows,
        .ce = row_params.ce,
        .z = row_params.z,
        .totals = row_params.totals,
        .reduction = reduction,
        .loss = static_cast<float*>(loss.data_ptr()),
    };
    run(kOp, logits, reduce_params, cross_entropy_reduce_cpu, cross_entropy_reduce_cuda);
    return {loss, statistics};
  }
};

// -> [3] float64: the totals of `targets`, for calls of cross_entropy_forward on parts of the rows; `like` is [N, any].
Tensor cross_entropy_totals(Tensor like, Tensor targets, std::optional<Tensor> weight, int64_t vocab_size,
                            int64_t ignore_index, int64_t reduction, std::optional<double> num_items) {
  check_shape(kOp, "like", like, "[N, *]", {kAny, kAny});
  return Labels(like, targets, weight, vocab_size, ignore_index).totals(reduction, num_items);
}

// -> (loss [] or [N], statistics [N, 2], dlogits [N, V] for an upstream gradient of 1, or [0, V]). With `totals`, the
// rows count as a part of those that the totals were made of.
std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor targets, std::optional<Tensor> weight,
                                                         int64_t ignore_index, double label_smoothing, double z_loss,
                                                         double softcap, int64_t reduction,
                                                         std::optional<double> num_items, bool with_gradient,
                                                         std::optional<Tensor> totals) {
  Arguments arguments(logits, targets, weight, ignore_index, label_smoothing, z_loss, softcap);
  arguments.set_totals(totals, reduction, num_items);
  Tensor dlogits = new_empty(logits, {with_gradient ? logits.size(0) : 0, logits.size(1)}, logits.scalar_type());
  auto [loss, statistics] = arguments.forward(reduction, with_gradient ? &dlogits : nullptr);
  return {loss, statistics, dlogits};
}

// The same with the gradient written over the logits.
std::tuple<Tensor, Tensor> cross_entropy_forward_(Tensor logits, Tensor targets, std::optional<Tensor> weight,
                                                  int64_t ignore_index, double label_smoothing, double z_loss,
                                                  double softcap, int64_t reduction, std::optional<double> num_items,
                                                  std::optional<Tensor> totals) {
  Arguments arguments(logits, targets, weight, ignore_index, label_smoothing, z_loss, softcap);
  if (arguments.logits.data_ptr() != logits.data_ptr()) {
    fail(kOp, "logits", "have a dense last dimension for inplace=True", "stride " + std::to_string(logits.stride(1)));
  }
  if (logits.size(0) > 1 && logits.stride(0) < logits.size(1)) {
    fail(kOp, "logits", "not overlap itself for inplace=True", "row stride " + std::to_string(logits.stride(0)));
  }
  arguments.set_totals(totals, reduction, num_items);
  return arguments.forward(reduction, &logits);
}

// The gradient for an upstream gradient per row; statistics are what the forward pass returned.
Tensor cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, std::optional<Tensor> weight,
                              Tensor statistics, int64_t ignore_index, double label_smoothing, double z_loss,
                              double softcap) {
  Arguments arguments(logits, targets, weight, ignore_index, label_smoothing, z_loss, softcap);
  const int64_t rows = logits.size(0);
  check_shape(kOp, "dloss", dloss, "[N]", {rows});
  check_shape(kOp, "statistics", statistics, "[N, 2]", {rows, 2});
  for (const auto& [name, tensor] : {std::pair{"dloss", &dloss}, std::pair{"statistics", &statistics}}) {
    check_dtype(kOp, name, *tensor, statistics_dtype(arguments.dtype));
    check_same_device(kOp, name, *tensor, "logits", logits);
  }
  dloss = to_contiguous(dloss);
  statistics = to_contiguous(statistics);
  arguments.set_totals(std::nullopt, kReductionNone, std::nullopt);
  Tensor dlogits = new_empty(logits, {rows, logits.size(1)}, logits.scalar_type());
  CrossEntropyParams params = arguments.params(statistics, &dlogits);
  params.row_scale = static_cast<const float*>(dloss.data_ptr());
  if (rows > 0) run(kOp, logits, params, cross_entropy_cpu, cross_entropy_cuda);
  return dlogits;
}

// gradient *= scale, at no cost for the usual upstream gradient of exactly 1 where looking is free.
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
      "cross_entropy_totals(Tensor like, Tensor targets, Tensor? weight, int vocab_size, int ignore_index, "
      "int reduction, float? num_items) -> Tensor");
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, float label_smoothing, "
      "float z_loss, float softcap, int reduction, float? num_items, bool with_gradient, Tensor? totals=None) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_forward_(Tensor(a!) logits, Tensor targets, Tensor? weight, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, int reduction, float? num_items, Tensor? totals=None) -> "
      "(Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, Tensor? weight, Tensor statistics, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap) -> Tensor");
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor scale) -> ()");
}

#define ARFAST_CROSS_ENTROPY(device)                                      \
  STABLE_TORCH_LIBRARY_IMPL(arfast, device, m) {                          \
    m.impl("cross_entropy_totals", TORCH_BOX(&cross_entropy_totals));     \
    m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));   \
    m.impl("cross_entropy_forward_", TORCH_BOX(&cross_entropy_forward_)); \
    m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward)); \
    m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_));               \
  }
ARFAST_CROSS_ENTROPY(CPU)
ARFAST_CROSS_ENTROPY(CUDA)

}  // namespace arfast
