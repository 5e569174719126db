// Checks of tensors (options are checked in Python, once for both ops), denominators and reduction: see
// cross_entropy_arguments.h.
#include "cross_entropy/cross_entropy_arguments.h"

namespace arfast {
namespace {

double weight_at(const Tensor& weight, int64_t index) {
  return weight.scalar_type() == ScalarType::Double ? static_cast<const double*>(weight.data_ptr())[index]
                                                    : static_cast<const float*>(weight.data_ptr())[index];
}

}  // namespace

CrossEntropyArguments::CrossEntropyArguments(const char* op, int64_t num_rows, int64_t vocab_size, const Tensor& like,
                                             const Tensor& targets, const std::optional<Tensor>& weight,
                                             int64_t ignore_index, double label_smoothing, double z_loss,
                                             double softcap, int64_t reduction, std::optional<double> num_items)
    : targets_(targets),
      weight_(weight),
      ignore_index_(ignore_index),
      label_smoothing_(label_smoothing),
      z_loss_(z_loss),
      softcap_(softcap),
      reduction_(reduction) {
  check_shape(op, "targets", targets, "[N]", {num_rows});
  check_dtype(op, "targets", targets, ScalarType::Long);
  check_same_device(op, "targets", targets, "logits", like);
  if (vocab_size == 0) fail(op, "logits", "have at least one class", "0 classes");
  const DType dtype = float_dtype(op, "logits", like);
  if (weight) {
    check_shape(op, "weight", *weight, "[V]", {vocab_size});
    check_dtype(op, "weight", *weight, statistics_dtype(dtype));
    check_same_device(op, "weight", *weight, "logits", like);
    weight_ = torch::stable::contiguous(*weight);
  }
  targets_ = torch::stable::contiguous(targets);

  int64_t num_kept = 0;
  double kept_weight = 0;
  const int64_t* rows = static_cast<const int64_t*>(targets_.data_ptr());
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t target = rows[i];
    if (target == ignore_index) continue;
    if (target < 0 || target >= vocab_size) {
      fail(op, "targets", "be in [0, " + std::to_string(vocab_size) + ") or " + std::to_string(ignore_index),
           std::to_string(target) + " at row " + std::to_string(i));
    }
    ++num_kept;
    if (weight_) kept_weight += weight_at(*weight_, target);
  }
  if (weight_) {
    for (int64_t v = 0; v < vocab_size; ++v) weight_sum_ += weight_at(*weight_, v);
  } else {
    weight_sum_ = static_cast<double>(vocab_size);
    kept_weight = static_cast<double>(num_kept);
  }
  if (reduction == kReductionMean) {
    ce_scale_ = 1 / (num_items ? *num_items : kept_weight);
    z_scale_ = 1 / (num_items ? *num_items : static_cast<double>(num_kept));
  }
}

CrossEntropyParams CrossEntropyArguments::params(DType dtype, const Tensor& logits) const {
  return CrossEntropyParams{
      .dtype = dtype,
      .num_rows = logits.size(0),
      .vocab_size = logits.size(1),
      .logits = logits.data_ptr(),
      .logits_stride = logits.stride(0),
      .targets = static_cast<const int64_t*>(targets_.data_ptr()),
      .ignore_index = ignore_index_,
      .weight = static_cast<const float*>(pointer_or_null(weight_)),
      .weight_sum = weight_sum_,
      .label_smoothing = label_smoothing_,
      .z_loss = z_loss_,
      .softcap = softcap_,
      .ce_scale = ce_scale_,
      .z_scale = z_scale_,
      .row_scale = nullptr,
      .ce = nullptr,
      .z = nullptr,
      .statistics = nullptr,
      .dlogits = nullptr,
      .dlogits_stride = 0,
  };
}

CrossEntropyLosses::CrossEntropyLosses(const Tensor& like, DType dtype)
    : dtype_(dtype),
      ce_(new_empty(like, {like.size(0)}, statistics_dtype(dtype))),
      z_(new_empty(like, {like.size(0)}, statistics_dtype(dtype))) {}

Tensor CrossEntropyLosses::reduce(const CrossEntropyArguments& arguments) const {
  return dtype_ == DType::kFloat64 ? reduce_as<double>(arguments) : reduce_as<float>(arguments);
}

template <typename T>
Tensor CrossEntropyLosses::reduce_as(const CrossEntropyArguments& arguments) const {
  const T* ce = static_cast<const T*>(ce_.data_ptr());
  const T* z = static_cast<const T*>(z_.data_ptr());
  const int64_t rows = ce_.size(0);
  if (arguments.reduction() == kReductionNone) {
    Tensor loss = new_empty(ce_, {rows}, statistics_dtype(dtype_));
    for (int64_t i = 0; i < rows; ++i) static_cast<T*>(loss.data_ptr())[i] = ce[i] + z[i];
    return loss;
  }
  double ce_sum = 0, z_sum = 0;
  for (int64_t i = 0; i < rows; ++i) {
    ce_sum += ce[i];
    z_sum += z[i];
  }
  Tensor loss = new_empty(ce_, {}, statistics_dtype(dtype_));
  *static_cast<T*>(loss.data_ptr()) = static_cast<T>(ce_sum * arguments.ce_scale() + z_sum * arguments.z_scale());
  return loss;
}

}  // namespace arfast
