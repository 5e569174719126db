// The arguments that cross_entropy and linear_cross_entropy share at the binding: their checks and the reduction.
#pragma once

#include "binding/tensor.h"
#include "cross_entropy/cross_entropy.h"

namespace arfast {

enum Reduction : int64_t { kReductionNone, kReductionMean, kReductionSum };

// Everything beside the logits, checked, with the denominators of the mean.
class CrossEntropyArguments {
 public:
  CrossEntropyArguments(const char* op, int64_t num_rows, int64_t vocab_size, const Tensor& like, const Tensor& targets,
                        const std::optional<Tensor>& weight, int64_t ignore_index, double label_smoothing,
                        double z_loss, double softcap, int64_t reduction, std::optional<double> num_items);

  // Logits, targets, options and scales; outputs are the caller's to add.
  CrossEntropyParams params(DType dtype, const Tensor& logits) const;

  int64_t reduction() const { return reduction_; }
  double ce_scale() const { return ce_scale_; }
  double z_scale() const { return z_scale_; }

 private:
  Tensor targets_;
  std::optional<Tensor> weight_;
  int64_t ignore_index_;
  double label_smoothing_, z_loss_, softcap_;
  int64_t reduction_;
  double weight_sum_ = 0;
  double ce_scale_ = 1;  // 1, or 1 / the denominator of the mean
  double z_scale_ = 1;
};

// The per-row losses and their sum in a fixed order.
class CrossEntropyLosses {
 public:
  CrossEntropyLosses(const Tensor& like, DType dtype);
  float* ce() const { return static_cast<float*>(ce_.data_ptr()); }
  float* z() const { return static_cast<float*>(z_.data_ptr()); }
  // Loss [N] for kReductionNone, else [].
  Tensor reduce(const CrossEntropyArguments& arguments) const;

 private:
  template <typename T>
  Tensor reduce_as(const CrossEntropyArguments& arguments) const;

  DType dtype_;
  Tensor ce_, z_;  // [N]
};

}  // namespace arfast
