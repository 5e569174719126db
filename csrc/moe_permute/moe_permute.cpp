// Bindings of moe_permute and moe_combine: schemas, checks, allocation and the choice of the implementation.
#include "moe_permute/moe_permute.h"

#include <tuple>

#include "binding/routing.h"
#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kPermute = "moe_permute";
constexpr const char* kCombine = "moe_combine";

// -> hidden[source_token] [R, d]
Tensor moe_permute(Tensor hidden, Tensor source_token) {
  check_shape(kPermute, "hidden", hidden, "[T, d]", {kAny, kAny});
  const DType dtype = float_dtype(kPermute, "hidden", hidden);
  source_token = checked_integers(kPermute, "source_token", source_token, "[R]", {kAny}, "hidden", hidden);
  hidden = with_dense_rows(hidden);
  const auto* tokens = static_cast<const int32_t*>(source_token.data_ptr());
  const int64_t rows = source_token.size(0), num_tokens = hidden.size(0);
  // A GPU would have to be waited for: there, such a row is filled with zeros.
  for (int64_t row = 0; row < rows && on_cpu(hidden); ++row) {
    if (tokens[row] < 0 || tokens[row] >= num_tokens) {
      fail(kPermute, "source_token", "be in [0, T=" + std::to_string(num_tokens) + ")",
           std::to_string(tokens[row]) + " at row " + std::to_string(row));
    }
  }
  Tensor out = new_empty(hidden, {rows, hidden.size(1)}, hidden.scalar_type());
  if (out.numel() == 0) return out;
  const MoePermuteParams params{
      .dtype = dtype,
      .num_tokens = num_tokens,
      .num_rows = rows,
      .hidden_size = hidden.size(1),
      .hidden = hidden.data_ptr(),
      .source_token = tokens,
      .hidden_stride = hidden.stride(0),
      .out = out.data_ptr(),
  };
  run(kPermute, hidden, params, moe_permute_cpu, moe_permute_cuda);
  return out;
}

void check_combine(const Tensor& expert_out, const Tensor& position) {
  check_shape(kCombine, "position", position, "[T, K]", {kAny, kAny});
  check_dtype(kCombine, "position", position, ScalarType::Int);
  check_shape(kCombine, "expert_out", expert_out, "[T * K, d]", {position.numel(), kAny});
  check_same_device(kCombine, "position", position, "expert_out", expert_out);
}

void check_weights(const Tensor& expert_weights, const Tensor& expert_out, const Tensor& position) {
  check_shape(kCombine, "expert_weights", expert_weights, "[T, K]", {position.size(0), position.size(1)});
  check_dtype(kCombine, "expert_weights", expert_weights, statistics_dtype(expert_out));
  check_same_device(kCombine, "expert_weights", expert_weights, "expert_out", expert_out);
}

// -> sum_j expert_weights[t, j] * expert_out[position[t, j]] [T, d]; without weights their plain sum
Tensor moe_combine_forward(Tensor expert_out, std::optional<Tensor> expert_weights, Tensor position) {
  const DType dtype = float_dtype(kCombine, "expert_out", expert_out);
  check_combine(expert_out, position);
  if (expert_weights) {
    check_weights(*expert_weights, expert_out, position);
    expert_weights = to_contiguous(*expert_weights);
  }
  expert_out = with_dense_rows(expert_out);
  position = to_contiguous(position);
  if (on_cpu(position)) invert_position(kCombine, position);  // a check that on a GPU would wait for it
  Tensor out = new_empty(expert_out, {position.size(0), expert_out.size(1)}, expert_out.scalar_type());
  const MoeCombineParams params{
      .dtype = dtype,
      .num_tokens = position.size(0),
      .top_k = position.size(1),
      .hidden_size = expert_out.size(1),
      .expert_out = expert_out.data_ptr(),
      .expert_out_stride = expert_out.stride(0),
      .expert_weights = static_cast<const float*>(pointer_or_null(expert_weights)),
      .position = static_cast<const int32_t*>(position.data_ptr()),
      .out = out.data_ptr(),
  };
  run(kCombine, expert_out, params, moe_combine_forward_cpu, moe_combine_forward_cuda);
  return out;
}

// -> (dexpert_out [T * K, d], dexpert_weights [T, K])
std::tuple<Tensor, Tensor> moe_combine_backward(Tensor dout, Tensor expert_out, Tensor expert_weights,
                                                Tensor position) {
  const DType dtype = float_dtype(kCombine, "expert_out", expert_out);
  check_combine(expert_out, position);
  check_weights(expert_weights, expert_out, position);
  check_shape(kCombine, "dout", dout, "[T, d]", {position.size(0), expert_out.size(1)});
  check_same_dtype(kCombine, "dout", dout, "expert_out", expert_out);
  check_same_device(kCombine, "dout", dout, "expert_out", expert_out);
  dout = with_dense_rows(dout);
  expert_out = with_dense_rows(expert_out);
  expert_weights = to_contiguous(expert_weights);
  position = to_contiguous(position);
  if (on_cpu(position)) invert_position(kCombine, position);  // a check that on a GPU would wait for it
  Tensor dexpert_out = new_empty(expert_out, {expert_out.size(0), expert_out.size(1)}, expert_out.scalar_type());
  Tensor dexpert_weights =
      new_empty(expert_weights, {position.size(0), position.size(1)}, expert_weights.scalar_type());
  const MoeCombineBackwardParams params{
      .dtype = dtype,
      .num_tokens = position.size(0),
      .top_k = position.size(1),
      .hidden_size = expert_out.size(1),
      .dout = dout.data_ptr(),
      .expert_out = expert_out.data_ptr(),
      .dout_stride = dout.stride(0),
      .expert_out_stride = expert_out.stride(0),
      .expert_weights = static_cast<const float*>(expert_weights.data_ptr()),
      .position = static_cast<const int32_t*>(position.data_ptr()),
      .dexpert_out = dexpert_out.data_ptr(),
      .dexpert_weights = static_cast<float*>(dexpert_weights.data_ptr()),
  };
  run(kCombine, expert_out, params, moe_combine_backward_cpu, moe_combine_backward_cuda);
  return {dexpert_out, dexpert_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def("moe_permute(Tensor hidden, Tensor source_token) -> Tensor");
  m.def("moe_combine_forward(Tensor expert_out, Tensor? expert_weights, Tensor position) -> Tensor");
  m.def(
      "moe_combine_backward(Tensor dout, Tensor expert_out, Tensor expert_weights, Tensor position) "
      "-> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_combine_forward", TORCH_BOX(&moe_combine_forward));
  m.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward));
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) {
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_combine_forward", TORCH_BOX(&moe_combine_forward));
  m.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward));
}

}  // namespace arfast
