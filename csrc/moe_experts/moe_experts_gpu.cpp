// The pass of moe_experts on a GPU: its own kernels, grouped_mm's and moe_combine's one after the other. None waits for
// the host, and neither gathered rows nor the experts' outputs are kept.
#include "moe_experts/moe_experts_gpu.h"

#include "grouped_mm/grouped_mm.h"
#include "moe_experts/arguments.h"
#include "moe_permute/moe_permute.h"

namespace arfast {
namespace {

constexpr const char* kOp = MoeExpertsArguments::kOp;

const int32_t* integers(const Tensor& tensor) { return static_cast<const int32_t*>(tensor.data_ptr()); }
const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

MoeRows rows_of(const MoeExpertsArguments& arguments) {
  return {
      .dtype = float_dtype(kOp, "hidden", arguments.hidden),
      .num_tokens = arguments.hidden.size(0),
      .num_rows = arguments.position.numel(),
      .num_experts = arguments.w_down.size(0),
      .hidden_size = arguments.hidden.size(1),
      .intermediate_size = arguments.w_down.size(2),
      .offsets = integers(arguments.offsets),
      .source_token = integers(arguments.source_token),
  };
}

// rows [R, K] times weights [E, K, N] (or, as they lie, [E, N, K] transposed) -> out [R, N].
GroupedMmParams product(const MoeRows& rows, const Tensor& left, const Tensor& weights, bool transpose,
                        const Tensor& out) {
  Matrix matrix = dense_matrix(weights.data_ptr(), weights.size(1), weights.size(2));
  if (transpose) matrix = transposed(matrix);
  return {
      .dtype = rows.dtype,
      .num_groups = rows.num_experts,
      .offsets = rows.offsets,
      .a = dense_matrix(left.data_ptr(), left.size(0), left.size(1)),
      .b = matrix,
      .b_group_stride = weights.stride(0),
      .out = dense_matrix(out.data_ptr(), out.size(0), out.size(1)),
      .matmul = nullptr,
  };
}

// The sum of every token's rows; expert_weights nullptr: unweighted.
MoeCombineParams combination(const MoeExpertsArguments& arguments, const MoeRows& rows, const Tensor& expert_out,
                             const float* expert_weights, const Tensor& out) {
  return {
      .dtype = rows.dtype,
      .num_tokens = rows.num_tokens,
      .top_k = arguments.position.size(1),
      .hidden_size = rows.hidden_size,
      .expert_out = expert_out.data_ptr(),
      .expert_out_stride = rows.hidden_size,
      .expert_weights = expert_weights,
      .position = integers(arguments.position),
      .out = out.data_ptr(),
  };
}

}  // namespace

MoeExpertsResult moe_experts_forward_on_gpu(const MoeExpertsArguments& arguments, bool save_h) {
  const MoeRows rows = rows_of(arguments);
  const Tensor& hidden = arguments.hidden;
  const ScalarType dtype = hidden.scalar_type();
  Tensor out = new_empty(hidden, {rows.num_tokens, rows.hidden_size}, dtype);
  Tensor h = new_empty(hidden, {save_h ? rows.num_rows : 0, 2 * rows.intermediate_size}, dtype);
  Tensor activation = new_empty(hidden, {rows.num_rows, rows.intermediate_size}, dtype);
  Tensor expert_out = new_empty(hidden, {rows.num_rows, rows.hidden_size}, dtype);
  const MoeGateUpParams gate_up{
      .rows = rows,
      .hidden = hidden.data_ptr(),
      .hidden_stride = hidden.stride(0),
      .w_gate_up = arguments.w_gate_up.data_ptr(),
      .h = save_h ? h.data_ptr() : nullptr,
      .activation = activation.data_ptr(),
  };
  const CudaScope scope(kOp, hidden);
  scope.check(moe_gate_up_cuda(gate_up, scope.stream()));
  scope.check(grouped_mm_cuda(product(rows, activation, arguments.w_down, true, expert_out), scope.stream()));
  const float* weights = floats(arguments.expert_weights);
  scope.check(moe_combine_forward_cuda(combination(arguments, rows, expert_out, weights, out), scope.stream()));
  return {out, h};
}

MoeExpertsGradients moe_experts_backward_on_gpu(const MoeExpertsArguments& arguments, const Tensor& dout,
                                                const Tensor& h, bool needs_hidden, bool needs_experts) {
  const MoeRows rows = rows_of(arguments);
  const Tensor& hidden = arguments.hidden;
  const ScalarType dtype = hidden.scalar_type();
  const int64_t d = rows.hidden_size, size = rows.intermediate_size, experts = needs_experts ? rows.num_experts : 0;
  Tensor dhidden = new_empty(hidden, {needs_hidden ? rows.num_tokens : 0, d}, dtype);
  Tensor dexpert_weights = new_empty(hidden, {rows.num_tokens, arguments.position.size(1)}, ScalarType::Float);
  Tensor dw_gate_up = new_empty(hidden, {experts, 2 * size, d}, dtype);
  Tensor dw_down = new_empty(hidden, {experts, d, size}, dtype);
  Tensor dh = new_empty(hidden, {rows.num_rows, 2 * size}, dtype);
  Tensor weighted = new_empty(hidden, {rows.num_rows, size}, dtype);
  Tensor partial = new_empty(hidden, {rows.num_rows, moe_column_tiles(size)}, ScalarType::Float);
  const CudaScope scope(kOp, hidden);
  const MoeDownBackwardParams down{
      .rows = rows,
      .top_k = arguments.position.size(1),
      .dout = dout.data_ptr(),
      .dout_stride = dout.stride(0),
      .w_down = arguments.w_down.data_ptr(),
      .h = h.data_ptr(),
      .expert_weights = floats(arguments.expert_weights),
      .position = integers(arguments.position),
      .dh = dh.data_ptr(),
      .weighted = weighted.data_ptr(),
      .partial_dweights = static_cast<float*>(partial.data_ptr()),
      .dexpert_weights = static_cast<float*>(dexpert_weights.data_ptr()),
  };
  scope.check(moe_down_backward_cuda(down, scope.stream()));
  if (needs_hidden) {
    Tensor drows = new_empty(hidden, {rows.num_rows, d}, dtype);
    scope.check(grouped_mm_cuda(product(rows, dh, arguments.w_gate_up, false, drows), scope.stream()));
    scope.check(moe_combine_forward_cuda(combination(arguments, rows, drows, nullptr, dhidden), scope.stream()));
  }
  if (needs_experts) {
    const auto gradient = [&](bool a_by_token, const Tensor& a, const Tensor& b, const Tensor& out) {
      scope.check(moe_weight_gradient_cuda({.rows = rows,
                                            .a_by_token = a_by_token,
                                            .a = a.data_ptr(),
                                            .b = b.data_ptr(),
                                            .a_stride = a.stride(0),
                                            .b_stride = b.stride(0),
                                            .num_rows = out.size(1),
                                            .num_columns = out.size(2),
                                            .out = out.data_ptr()},
                                           scope.stream()));
    };
    gradient(true, dout, weighted, dw_down);
    gradient(false, dh, hidden, dw_gate_up);
  }
  return {dhidden, dexpert_weights, dw_gate_up, dw_down};
}

}  // namespace arfast
