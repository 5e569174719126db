// The arguments that both passes of moe_experts share, checked and dense, and its pass on a GPU.
#pragma once

#include <tuple>

#include "binding/tensor.h"

namespace arfast {

struct MoeExpertsArguments {
  static constexpr const char* kOp = "moe_experts";

  Tensor hidden, expert_weights, position, source_token, offsets, w_gate_up, w_down;

  // Shapes, dtypes and devices.
  void check_and_make_dense() {
    check_shape(kOp, "hidden", hidden, "[T, d]", {kAny, kAny});
    float_dtype(kOp, "hidden", hidden);
    check_shape(kOp, "w_down", w_down, "[E, d, I]", {kAny, hidden.size(1), kAny});
    check(w_down.numel() > 0, kOp, "w_down", "have no size of 0", shape_of(w_down));
    check_shape(kOp, "w_gate_up", w_gate_up, "[E, 2 I, d]", {w_down.size(0), 2 * w_down.size(2), hidden.size(1)});
    check_like_hidden("w_gate_up", w_gate_up);
    check_like_hidden("w_down", w_down);
    check_shape(kOp, "expert_weights", expert_weights, "[T, K]", {hidden.size(0), kAny});
    check_dtype(kOp, "expert_weights", expert_weights, statistics_dtype(hidden));
    check_same_device(kOp, "expert_weights", expert_weights, "hidden", hidden);
    position = routing_table("position", position, "[T, K]", {hidden.size(0), expert_weights.size(1)});
    source_token = routing_table("source_token", source_token, "[T * K]", {position.numel()});
    offsets = routing_table("offsets", offsets, "[E + 1]", {w_down.size(0) + 1});
    hidden = with_dense_rows(hidden);
    for (Tensor* tensor : {&expert_weights, &w_gate_up, &w_down}) {
      *tensor = to_contiguous(*tensor);
    }
  }

  // What the backward pass has beside them.
  void check_and_make_dense(Tensor& dout, Tensor& h) const {
    check_shape(kOp, "dout", dout, "[T, d]", {hidden.size(0), hidden.size(1)});
    check_like_hidden("dout", dout);
    check_shape(kOp, "h", h, "[T * K, 2 I]", {position.numel(), w_gate_up.size(1)});
    check_like_hidden("h", h);
    dout = with_dense_rows(dout);
    h = to_contiguous(h);
  }

  void check_like_hidden(const char* argument, const Tensor& tensor) const {
    check_same_dtype(kOp, argument, tensor, "hidden", hidden);
    check_same_device(kOp, argument, tensor, "hidden", hidden);
  }
  Tensor routing_table(const char* argument, const Tensor& tensor, const char* names,
                       std::initializer_list<int64_t> sizes) const {
    return checked_integers(kOp, argument, tensor, names, sizes, "hidden", hidden);
  }
};

// (out [T, d], h [T * K, 2 I] pre-activations (empty unless save_h))
using MoeExpertsResult = std::tuple<Tensor, Tensor>;
// (dhidden [T, d] (empty unless needs_hidden), dexpert_weights [T, K], dw_gate_up [E, 2 I, d] and dw_down [E, d, I]
//  (empty unless needs_experts))
using MoeExpertsGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

MoeExpertsResult moe_experts_forward_on_gpu(const MoeExpertsArguments& arguments, bool save_h);
MoeExpertsGradients moe_experts_backward_on_gpu(const MoeExpertsArguments& arguments, const Tensor& dout,
                                                const Tensor& h, bool needs_hidden, bool needs_experts);

}  // namespace arfast
