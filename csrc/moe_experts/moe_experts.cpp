// Binding of moe_experts: schema, choice of the device, and the pass on the CPU.
#include "moe_experts/moe_experts.h"

#include <algorithm>
#include <tuple>

#include "binding/matmul.h"
#include "binding/routing.h"
#include "binding/tensor.h"
#include "moe_experts/arguments.h"

namespace arfast {
namespace {

constexpr const char* kOp = MoeExpertsArguments::kOp;

// Enough rows for every thread to have a few tasks, few enough for their scratch memory to stay in a cache. On two
// threads 2048 take 6 % less than 4096, 1024 no less (forward and backward pass, float32, Granite Rapids, November
// 2026).
constexpr int64_t kWaveRows = 2048, kWaveRowsPerThread = 512;

int64_t wave_rows(const Tensor& offsets) {
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

// The choice behind each row [T * K], from tables that agree with each other.
Tensor checked_choices(const MoeExpertsArguments& arguments) {
  check_offsets(kOp, arguments.offsets, arguments.position.numel());
  Tensor choices = invert_position(kOp, arguments.position);
  const auto* choice = static_cast<const int32_t*>(choices.data_ptr());
  const auto* token = static_cast<const int32_t*>(arguments.source_token.data_ptr());
  const auto top_k = static_cast<int32_t>(arguments.position.size(1));
  for (int64_t row = 0; row < choices.numel(); ++row) {
    if (token[row] == choice[row] / top_k) continue;
    fail(kOp, "source_token", "name the token of every row as position does",
         std::to_string(token[row]) + " for row " + std::to_string(row));
  }
  const auto* first_rows = static_cast<const int32_t*>(arguments.offsets.data_ptr());
  for (int64_t expert = 0; expert + 1 < arguments.offsets.size(0); ++expert) {
    for (int64_t row = first_rows[expert] + 1; row < first_rows[expert + 1]; ++row) {
      if (choice[row] > choice[row - 1]) continue;
      fail(kOp, "position", "order the rows of an expert by token",
           "choice " + std::to_string(choice[row]) + " after " + std::to_string(choice[row - 1]));
    }
  }
  return choices;
}

MoeExpertsShape shape_on_cpu(const MoeExpertsArguments& arguments, const Tensor& choices) {
  return {
      .dtype = float_dtype(kOp, "hidden", arguments.hidden),
      .num_tokens = arguments.hidden.size(0),
      .top_k = arguments.expert_weights.size(1),
      .num_experts = arguments.w_down.size(0),
      .hidden_size = arguments.hidden.size(1),
      .intermediate_size = arguments.w_down.size(2),
      .offsets = static_cast<const int32_t*>(arguments.offsets.data_ptr()),
      .choices = static_cast<const int32_t*>(choices.data_ptr()),
      .wave_rows = wave_rows(arguments.offsets),
      .matmul = fastest_matmul,
  };
}

// Where sums over the experts are taken: `out` itself when its type is wide enough.
Tensor accumulator_for(const Tensor& out) {
  if (out.scalar_type() == statistics_dtype(out)) return out;
  return new_empty(out, {out.size(0), out.size(1)}, statistics_dtype(out));
}

MoeExpertsResult moe_experts_forward(Tensor hidden, Tensor expert_weights, Tensor position, Tensor source_token,
                                     Tensor offsets, Tensor w_gate_up, Tensor w_down, bool save_h) {
  MoeExpertsArguments arguments{hidden, expert_weights, position, source_token, offsets, w_gate_up, w_down};
  arguments.check_and_make_dense();
  if (!on_cpu(hidden)) return moe_experts_forward_on_gpu(arguments, save_h);
  const Tensor choices = checked_choices(arguments);
  const MoeExpertsShape shape = shape_on_cpu(arguments, choices);
  const ScalarType dtype = hidden.scalar_type();
  const int64_t d = shape.hidden_size, size = shape.intermediate_size;
  Tensor out = new_empty(hidden, {shape.num_tokens, d}, dtype);
  Tensor h = new_empty(hidden, {save_h ? shape.num_tokens * shape.top_k : 0, 2 * size}, dtype, Pages::kSmall);
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

MoeExpertsGradients moe_experts_backward(Tensor dout, Tensor hidden, Tensor expert_weights, Tensor position,
                                         Tensor source_token, Tensor offsets, Tensor w_gate_up, Tensor w_down, Tensor h,
                                         bool needs_hidden, bool needs_experts) {
  MoeExpertsArguments arguments{hidden, expert_weights, position, source_token, offsets, w_gate_up, w_down};
  arguments.check_and_make_dense();
  arguments.check_and_make_dense(dout, h);
  if (!on_cpu(hidden)) return moe_experts_backward_on_gpu(arguments, dout, h, needs_hidden, needs_experts);
  const Tensor choices = checked_choices(arguments);
  const MoeExpertsShape shape = shape_on_cpu(arguments, choices);
  const ScalarType dtype = hidden.scalar_type();
  const int64_t d = shape.hidden_size, size = shape.intermediate_size, experts = shape.num_experts;
  Tensor dhidden = new_empty(hidden, {needs_hidden ? shape.num_tokens : 0, d}, dtype);
  Tensor dexpert_weights = new_empty(hidden, {shape.num_tokens, shape.top_k}, statistics_dtype(hidden));
  Tensor dw_gate_up = new_empty(hidden, {needs_experts ? experts : 0, 2 * size, d}, dtype, Pages::kSmall);
  Tensor dw_down = new_empty(hidden, {needs_experts ? experts : 0, d, size}, dtype, Pages::kSmall);
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
      "moe_experts_forward(Tensor hidden, Tensor expert_weights, Tensor position, Tensor source_token, Tensor offsets, "
      "Tensor w_gate_up, Tensor w_down, bool save_h) -> (Tensor, Tensor)");
  m.def(
      "moe_experts_backward(Tensor dout, Tensor hidden, Tensor expert_weights, Tensor position, Tensor source_token, "
      "Tensor offsets, Tensor w_gate_up, Tensor w_down, Tensor h, bool needs_hidden, bool needs_experts) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("moe_experts_forward", TORCH_BOX(&moe_experts_forward));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) {
  m.impl("moe_experts_forward", TORCH_BOX(&moe_experts_forward));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
}

}  // namespace arfast
