// Binding of moe_experts: schema, checks, allocation and the choice of the implementation.
#include "moe_experts/moe_experts.h"

#include <algorithm>
#include <tuple>

#include "binding/matmul.h"
#include "binding/routing.h"
#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "moe_experts";

void check_like_hidden(const char* argument, const Tensor& tensor, const Tensor& hidden) {
  check_same_dtype(kOp, argument, tensor, "hidden", hidden);
  check_same_device(kOp, argument, tensor, "hidden", hidden);
}

// The arguments that both passes share, checked and dense.
struct Arguments {
  Tensor hidden, expert_weights, position, offsets, w_gate_up, w_down;
  Tensor choices;  // [T * K]: the choice behind each row

  void check_and_prepare() {
    check_shape(kOp, "hidden", hidden, "[T, d]", {kAny, kAny});
    float_dtype(kOp, "hidden", hidden);
    check_shape(kOp, "w_down", w_down, "[E, d, I]", {kAny, hidden.size(1), kAny});
    check(w_down.numel() > 0, kOp, "w_down", "have no size of 0", shape_of(w_down));
    check_shape(kOp, "w_gate_up", w_gate_up, "[E, 2 I, d]", {w_down.size(0), 2 * w_down.size(2), hidden.size(1)});
    check_like_hidden("w_gate_up", w_gate_up, hidden);
    check_like_hidden("w_down", w_down, hidden);
    check_shape(kOp, "expert_weights", expert_weights, "[T, K]", {hidden.size(0), kAny});
    check_dtype(kOp, "expert_weights", expert_weights, statistics_dtype(hidden));
    check_same_device(kOp, "expert_weights", expert_weights, "hidden", hidden);
    check_routing_table("position", position, "[T, K]", {hidden.size(0), expert_weights.size(1)}, hidden);
    check_routing_table("offsets", offsets, "[E + 1]", {w_down.size(0) + 1}, hidden);
    hidden = with_dense_rows(hidden);
    expert_weights = to_contiguous(expert_weights);
    position = to_contiguous(position);
    offsets = to_contiguous(offsets);
    w_gate_up = to_contiguous(w_gate_up);
    w_down = to_contiguous(w_down);
    check_offsets(kOp, offsets, position.numel());
    choices = invert_position(kOp, position);
    check_order();
  }

  int64_t wave_rows() const {
    const auto* values = static_cast<const int32_t*>(offsets.data_ptr());
    int64_t total = 0, largest = 0;
    for (int64_t expert = 0; expert + 1 < offsets.size(0); ++expert) {
      const int64_t rows = moe_padded_rows(values[expert + 1] - values[expert]);
      total += rows;
      largest = std::max(largest, rows);
    }
    const int64_t wave = std::max(kWaveRows, kWaveRowsPerThread * int64_t{torch::stable::get_num_threads()});
    return std::min(total, std::max(largest, wave));
  }

  MoeExpertsShape shape() const {
    return {
        .dtype = float_dtype(kOp, "hidden", hidden),
        .num_tokens = hidden.size(0),
        .top_k = expert_weights.size(1),
        .num_experts = w_down.size(0),
        .hidden_size = hidden.size(1),
        .intermediate_size = w_down.size(2),
        .offsets = static_cast<const int32_t*>(offsets.data_ptr()),
        .choices = static_cast<const int32_t*>(choices.data_ptr()),
        .wave_rows = wave_rows(),
        .matmul = fastest_matmul,
    };
  }

 private:
  // Enough for every thread to have a few tasks, little enough to stay in the last-level cache.
  static constexpr int64_t kWaveRows = 4096, kWaveRowsPerThread = 512;

  static void check_routing_table(const char* argument, const Tensor& tensor, const char* names,
                                  std::initializer_list<int64_t> sizes, const Tensor& hidden) {
    check_shape(kOp, argument, tensor, names, sizes);
    check_dtype(kOp, argument, tensor, ScalarType::Int);
    check_same_device(kOp, argument, tensor, "hidden", hidden);
  }

  void check_order() const {
    const auto* first_rows = static_cast<const int32_t*>(offsets.data_ptr());
    const auto* choice = static_cast<const int32_t*>(choices.data_ptr());
    for (int64_t expert = 0; expert + 1 < offsets.size(0); ++expert) {
      for (int64_t row = first_rows[expert] + 1; row < first_rows[expert + 1]; ++row) {
        check(choice[row] > choice[row - 1], kOp, "position", "order the rows of an expert by token",
              "choice " + std::to_string(choice[row]) + " after " + std::to_string(choice[row - 1]));
      }
    }
  }
};

// Where sums over the experts are taken: `out` itself when its type is wide enough.
Tensor accumulator_for(const Tensor& out) {
  if (out.scalar_type() == statistics_dtype(out)) return out;
  return new_empty(out, {out.size(0), out.size(1)}, statistics_dtype(out));
}

// -> (out [T, d], h [T * K, 2 I] pre-activations (empty unless save_h))
std::tuple<Tensor, Tensor> moe_experts_forward(Tensor hidden, Tensor expert_weights, Tensor position, Tensor offsets,
                                               Tensor w_gate_up, Tensor w_down, bool save_h) {
  Arguments arguments{hidden, expert_weights, position, offsets, w_gate_up, w_down, {}};
  arguments.check_and_prepare();
  const MoeExpertsShape shape = arguments.shape();
  const ScalarType dtype = hidden.scalar_type();
  const int64_t d = shape.hidden_size, size = shape.intermediate_size;
  Tensor out = new_empty(hidden, {shape.num_tokens, d}, dtype);
  Tensor h = new_empty(hidden, {save_h ? shape.num_tokens * shape.top_k : 0, 2 * size}, dtype);
  Tensor scratch = new_empty(hidden, {shape.wave_rows, 2 * d + 3 * size}, dtype);
  Tensor accumulator = accumulator_for(out);
  moe_experts_forward_cpu({
      .shape = shape,
      .hidden = arguments.hidden.data_ptr(),
      .hidden_stride = arguments.hidden.stride(0),
      .expert_weights = static_cast<const float*>(arguments.expert_weights.data_ptr()),
      .w_gate_up = arguments.w_gate_up.data_ptr(),
      .w_down = arguments.w_down.data_ptr(),
      .scratch = scratch.data_ptr(),
      .accumulator = accumulator.data_ptr(),
      .h = save_h ? h.data_ptr() : nullptr,
      .out = out.data_ptr(),
  });
  return {out, h};
}

// -> (dhidden [T, d] (empty unless needs_hidden), dexpert_weights [T, K], dw_gate_up [E, 2 I, d] and dw_down [E, d, I]
//     (empty unless needs_experts))
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_experts_backward(Tensor dout, Tensor hidden, Tensor expert_weights,
                                                                Tensor position, Tensor offsets, Tensor w_gate_up,
                                                                Tensor w_down, Tensor h, bool needs_hidden,
                                                                bool needs_experts) {
  Arguments arguments{hidden, expert_weights, position, offsets, w_gate_up, w_down, {}};
  arguments.check_and_prepare();
  const MoeExpertsShape shape = arguments.shape();
  const ScalarType dtype = hidden.scalar_type();
  const int64_t d = shape.hidden_size, size = shape.intermediate_size, experts = shape.num_experts;
  check_shape(kOp, "dout", dout, "[T, d]", {shape.num_tokens, d});
  check_like_hidden("dout", dout, hidden);
  check_shape(kOp, "h", h, "[T * K, 2 I]", {shape.num_tokens * shape.top_k, 2 * size});
  check_like_hidden("h", h, hidden);
  dout = with_dense_rows(dout);
  h = to_contiguous(h);

  Tensor dhidden = new_empty(hidden, {needs_hidden ? shape.num_tokens : 0, d}, dtype);
  Tensor dexpert_weights = new_empty(hidden, {shape.num_tokens, shape.top_k}, statistics_dtype(hidden));
  Tensor dw_gate_up = new_empty(hidden, {needs_experts ? experts : 0, 2 * size, d}, dtype);
  Tensor dw_down = new_empty(hidden, {needs_experts ? experts : 0, d, size}, dtype);
  Tensor scratch = new_empty(hidden, {shape.wave_rows, 3 * d + 3 * size}, dtype);
  Tensor accumulator = accumulator_for(dhidden);
  moe_experts_backward_cpu({
      .shape = shape,
      .dout = dout.data_ptr(),
      .dout_stride = dout.stride(0),
      .hidden = arguments.hidden.data_ptr(),
      .hidden_stride = arguments.hidden.stride(0),
      .expert_weights = static_cast<const float*>(arguments.expert_weights.data_ptr()),
      .w_gate_up = arguments.w_gate_up.data_ptr(),
      .w_down = arguments.w_down.data_ptr(),
      .h = h.data_ptr(),
      .scratch = scratch.data_ptr(),
      .accumulator = accumulator.data_ptr(),
      .dhidden = needs_hidden ? dhidden.data_ptr() : nullptr,
      .dexpert_weights = static_cast<float*>(dexpert_weights.data_ptr()),
      .dw_gate_up = needs_experts ? dw_gate_up.data_ptr() : nullptr,
      .dw_down = needs_experts ? dw_down.data_ptr() : nullptr,
  });
  return {dhidden, dexpert_weights, dw_gate_up, dw_down};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "moe_experts_forward(Tensor hidden, Tensor expert_weights, Tensor position, Tensor offsets, Tensor w_gate_up, "
      "Tensor w_down, bool save_h) -> (Tensor, Tensor)");
  m.def(
      "moe_experts_backward(Tensor dout, Tensor hidden, Tensor expert_weights, Tensor position, Tensor offsets, "
      "Tensor w_gate_up, Tensor w_down, Tensor h, bool needs_hidden, bool needs_experts) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("moe_experts_forward", TORCH_BOX(&moe_experts_forward));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
}

}  // namespace arfast
