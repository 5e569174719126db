// Binding of moe_route: schema, checks, allocation and the choice of the implementation.
#include "moe_routing/moe_routing.h"

#include <limits>
#include <tuple>

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "moe_route";

bool is_sigmoid(const std::string& score) {
  check(score == "softmax" || score == "sigmoid", kOp, "score", "be softmax or sigmoid", score);
  return score == "sigmoid";
}

void check_groups(int64_t num_experts, int64_t top_k, int64_t num_groups, int64_t top_groups) {
  check(num_groups >= 1 && num_groups <= num_experts && num_experts % num_groups == 0, kOp, "num_groups",
        "divide the number of experts", std::to_string(num_groups));
  check(top_groups >= 1 && top_groups <= num_groups && top_groups * (num_experts / num_groups) >= top_k, kOp,
        "top_groups", "be in [1, num_groups] and leave at least top_k experts", std::to_string(top_groups));
}

// -> (expert_ids [T, K], expert_weights [T, K], tokens_per_expert [E], offsets [E + 1], source_token [T * K],
//     position [T, K], lse [T])
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route_forward(
    Tensor router_logits, int64_t top_k, std::string score, bool renormalize, std::optional<Tensor> bias,
    int64_t num_groups, int64_t top_groups, double scale) {
  check_shape(kOp, "router_logits", router_logits, "[T, E]", {kAny, kAny});
  const DType dtype = float_dtype(kOp, "router_logits", router_logits);
  const int64_t tokens = router_logits.size(0), experts = router_logits.size(1);
  check(top_k >= 1 && top_k <= experts, kOp, "top_k",
        ("be in [1, num_experts=" + std::to_string(experts) + "]").c_str(), std::to_string(top_k));
  check(tokens * top_k <= std::numeric_limits<int32_t>::max(), kOp, "router_logits", "have at most 2^31 - 1 choices",
        std::to_string(tokens * top_k));
  const bool sigmoid = is_sigmoid(score);
  check_groups(experts, top_k, num_groups, top_groups);
  check_range(kOp, "scale", scale, scale > 0 && scale <= std::numeric_limits<float>::max(), "be positive and finite");
  if (bias) {
    check_shape(kOp, "bias", *bias, "[E]", {experts});
    check_same_device(kOp, "bias", *bias, "router_logits", router_logits);
    float_dtype(kOp, "bias", *bias);
    bias = to_contiguous(torch::stable::to(*bias, statistics_dtype(dtype)));
  }
  router_logits = with_dense_rows(router_logits);

  const Tensor& like = router_logits;
  Tensor expert_ids = new_empty(like, {tokens, top_k}, ScalarType::Int);
  Tensor expert_weights = new_empty(like, {tokens, top_k}, statistics_dtype(dtype));
  Tensor tokens_per_expert = new_empty(like, {experts}, ScalarType::Int);
  Tensor offsets = new_empty(like, {experts + 1}, ScalarType::Int);
  Tensor source_token = new_empty(like, {tokens * top_k}, ScalarType::Int);
  Tensor position = new_empty(like, {tokens, top_k}, ScalarType::Int);
  Tensor lse = new_empty(like, {tokens}, statistics_dtype(dtype));
  const int64_t block = on_cpu(like) ? kMoeRouteBlock : kMoeRouteGpuBlock;
  Tensor histograms = new_empty(like, {(tokens + block - 1) / block, experts}, ScalarType::Int);
  const MoeRouteParams params{
      .dtype = dtype,
      .num_tokens = tokens,
      .num_experts = experts,
      .top_k = top_k,
      .sigmoid = sigmoid,
      .renormalize = renormalize,
      .num_groups = num_groups,
      .top_groups = top_groups,
      .scale = scale,
      .router_logits = router_logits.data_ptr(),
      .logits_stride = router_logits.stride(0),
      .bias = static_cast<const float*>(pointer_or_null(bias)),
      .expert_ids = static_cast<int32_t*>(expert_ids.data_ptr()),
      .expert_weights = static_cast<float*>(expert_weights.data_ptr()),
      .tokens_per_expert = static_cast<int32_t*>(tokens_per_expert.data_ptr()),
      .offsets = static_cast<int32_t*>(offsets.data_ptr()),
      .source_token = static_cast<int32_t*>(source_token.data_ptr()),
      .position = static_cast<int32_t*>(position.data_ptr()),
      .lse = static_cast<float*>(lse.data_ptr()),
      .histograms = static_cast<int32_t*>(histograms.data_ptr()),
  };
  run(kOp, router_logits, params, moe_route_forward_cpu, moe_route_forward_cuda);
  return {expert_ids, expert_weights, tokens_per_expert, offsets, source_token, position, lse};
}

// -> drouter_logits [T, E]
Tensor moe_route_backward(std::optional<Tensor> dexpert_weights, std::optional<Tensor> dlse, Tensor router_logits,
                          Tensor expert_ids, Tensor expert_weights, Tensor lse, std::string score, bool renormalize,
                          double scale) {
  check_shape(kOp, "router_logits", router_logits, "[T, E]", {kAny, kAny});
  const DType dtype = float_dtype(kOp, "router_logits", router_logits);
  const int64_t tokens = router_logits.size(0), experts = router_logits.size(1);
  check_shape(kOp, "expert_ids", expert_ids, "[T, K]", {tokens, kAny});
  check_dtype(kOp, "expert_ids", expert_ids, ScalarType::Int);
  const int64_t top_k = expert_ids.size(1);
  const auto prepare = [&](const char* argument, const Tensor& tensor, const char* names,
                           std::initializer_list<int64_t> sizes) {
    check_shape(kOp, argument, tensor, names, sizes);
    check_dtype(kOp, argument, tensor, statistics_dtype(dtype));
    check_same_device(kOp, argument, tensor, "router_logits", router_logits);
    return to_contiguous(tensor);
  };
  check_same_device(kOp, "expert_ids", expert_ids, "router_logits", router_logits);
  expert_ids = to_contiguous(expert_ids);
  expert_weights = prepare("expert_weights", expert_weights, "[T, K]", {tokens, top_k});
  lse = prepare("lse", lse, "[T]", {tokens});
  if (dexpert_weights) dexpert_weights = prepare("dexpert_weights", *dexpert_weights, "[T, K]", {tokens, top_k});
  if (dlse) dlse = prepare("dlse", *dlse, "[T]", {tokens});
  const bool sigmoid = is_sigmoid(score);
  router_logits = with_dense_rows(router_logits);
  const auto* ids = static_cast<const int32_t*>(expert_ids.data_ptr());
  for (int64_t i = 0; i < tokens * top_k && on_cpu(router_logits); ++i) {  // a GPU would have to be waited for
    check(ids[i] >= 0 && ids[i] < experts, kOp, "expert_ids", "be in [0, E)", std::to_string(ids[i]));
  }

  Tensor drouter_logits = new_empty(router_logits, {tokens, experts}, router_logits.scalar_type());
  const MoeRouteBackwardParams params{
      .dtype = dtype,
      .num_tokens = tokens,
      .num_experts = experts,
      .top_k = top_k,
      .sigmoid = sigmoid,
      .renormalize = renormalize,
      .scale = scale,
      .router_logits = router_logits.data_ptr(),
      .logits_stride = router_logits.stride(0),
      .expert_ids = ids,
      .expert_weights = static_cast<const float*>(expert_weights.data_ptr()),
      .lse = static_cast<const float*>(lse.data_ptr()),
      .dexpert_weights = static_cast<const float*>(pointer_or_null(dexpert_weights)),
      .dlse = static_cast<const float*>(pointer_or_null(dlse)),
      .drouter_logits = drouter_logits.data_ptr(),
  };
  run(kOp, router_logits, params, moe_route_backward_cpu, moe_route_backward_cuda);
  return drouter_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "moe_route_forward(Tensor router_logits, int top_k, str score, bool renormalize, Tensor? bias, int num_groups, "
      "int top_groups, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor? dexpert_weights, Tensor? dlse, Tensor router_logits, Tensor expert_ids, "
      "Tensor expert_weights, Tensor lse, str score, bool renormalize, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("moe_route_forward", TORCH_BOX(&moe_route_forward));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) {
  m.impl("moe_route_forward", TORCH_BOX(&moe_route_forward));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
}

}  // namespace arfast
