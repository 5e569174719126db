// Binding of router_losses: schema, checks, allocation and the choice of the implementation.
#include "router_losses/router_losses.h"

#include <algorithm>
#include <tuple>

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "router_losses";

// [T, E], with E >= 1.
DType check_logits(const Tensor& router_logits) {
  check_shape(kOp, "router_logits", router_logits, "[T, E]", {kAny, kAny});
  check(router_logits.size(1) >= 1 && router_logits.size(0) < int64_t{1} << 23, kOp, "router_logits",
        "have T < 2^23 tokens and at least one expert", shape_of(router_logits));
  return float_dtype(kOp, "router_logits", router_logits);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// -> (balance [], z [], fractions [E], lse [T], num_counted int32 [1])
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> router_losses_forward(Tensor router_logits,
                                                                         std::optional<Tensor> expert_ids,
                                                                         std::optional<Tensor> mask, double divisor) {
  const DType dtype = check_logits(router_logits);
  const int64_t tokens = router_logits.size(0), experts = router_logits.size(1);
  if (expert_ids) {
    expert_ids = checked_dense(kOp, "expert_ids", *expert_ids, "[T, K]", {tokens, kAny}, ScalarType::Int,
                               "router_logits", router_logits);
  }
  if (mask) mask = checked_dense(kOp, "mask", *mask, "[T]", {tokens}, ScalarType::Bool, "router_logits", router_logits);
  check_range(kOp, "divisor", divisor, divisor > 0, "be positive");
  router_logits = with_dense_rows(router_logits);

  const ScalarType wide = statistics_dtype(dtype);
  Tensor balance = new_empty(router_logits, {}, wide), z = new_empty(router_logits, {}, wide);
  Tensor fractions = new_empty(router_logits, {experts}, wide);
  Tensor lse = new_empty(router_logits, {tokens}, wide);
  Tensor num_counted = new_zeros(router_logits, {1}, ScalarType::Int);
  RouterLossesForwardParams params{
      .dtype = dtype,
      .num_tokens = tokens,
      .num_experts = experts,
      .top_k = expert_ids ? expert_ids->size(1) : 0,
      .divisor = divisor,
      .router_logits = router_logits.data_ptr(),
      .logits_stride = router_logits.stride(0),
      .expert_ids = static_cast<const int32_t*>(pointer_or_null(expert_ids)),
      .mask = static_cast<const bool*>(pointer_or_null(mask)),
      .balance = data<float>(balance),
      .z = data<float>(z),
      .fractions = data<float>(fractions),
      .lse = data<float>(lse),
      .num_counted = data<int32_t>(num_counted),
      .choices = nullptr,
      .probabilities = nullptr,
      .squares = nullptr,
      .num_broken = nullptr,
      .num_arrived = nullptr,
  };
  Tensor zeros, squares;
  if (!on_cpu(router_logits)) {
    zeros = new_zeros(router_logits, {3 * experts + 2}, ScalarType::Int);  // 64-bit sums first: they need alignment
    squares = new_empty(router_logits, {std::max<int64_t>(1, (tokens - 1) / kRouterLossesGpuBlock + 1)}, wide);
    params.probabilities = data<uint64_t>(zeros);
    params.choices = data<int32_t>(zeros) + 2 * experts;
    params.num_broken = params.choices + experts;
    params.num_arrived = reinterpret_cast<uint32_t*>(params.num_broken + 1);
    params.squares = data<float>(squares);
  }
  run(kOp, router_logits, params, router_losses_forward_cpu, router_losses_forward_cuda);
  return {balance, z, fractions, lse, num_counted};
}

Tensor router_losses_backward(std::optional<Tensor> dbalance, std::optional<Tensor> dz, Tensor router_logits,
                              std::optional<Tensor> mask, Tensor fractions, Tensor lse, Tensor num_counted) {
  const DType dtype = check_logits(router_logits);
  const int64_t tokens = router_logits.size(0), experts = router_logits.size(1);
  const ScalarType wide = statistics_dtype(dtype);
  const auto scalar = [&](const char* name, std::optional<Tensor>& tensor) {
    if (tensor) tensor = checked_dense(kOp, name, *tensor, "[]", {}, wide, "router_logits", router_logits);
  };
  scalar("dbalance", dbalance);
  scalar("dz", dz);
  if (mask) mask = checked_dense(kOp, "mask", *mask, "[T]", {tokens}, ScalarType::Bool, "router_logits", router_logits);
  fractions = checked_dense(kOp, "fractions", fractions, "[E]", {experts}, wide, "router_logits", router_logits);
  lse = checked_dense(kOp, "lse", lse, "[T]", {tokens}, wide, "router_logits", router_logits);
  num_counted =
      checked_dense(kOp, "num_counted", num_counted, "[1]", {1}, ScalarType::Int, "router_logits", router_logits);
  router_logits = with_dense_rows(router_logits);
  Tensor drouter_logits = new_empty(router_logits, {tokens, experts}, router_logits.scalar_type());
  const RouterLossesBackwardParams params{
      .dtype = dtype,
      .num_tokens = tokens,
      .num_experts = experts,
      .router_logits = router_logits.data_ptr(),
      .logits_stride = router_logits.stride(0),
      .mask = static_cast<const bool*>(pointer_or_null(mask)),
      .fractions = data<float>(fractions),
      .lse = data<float>(lse),
      .num_counted = data<int32_t>(num_counted),
      .dbalance = static_cast<const float*>(pointer_or_null(dbalance)),
      .dz = static_cast<const float*>(pointer_or_null(dz)),
      .drouter_logits = drouter_logits.data_ptr(),
  };
  run(kOp, router_logits, params, router_losses_backward_cpu, router_losses_backward_cuda);
  return drouter_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "router_losses_forward(Tensor router_logits, Tensor? expert_ids, Tensor? mask, float divisor) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "router_losses_backward(Tensor? dbalance, Tensor? dz, Tensor router_logits, Tensor? mask, Tensor fractions, "
      "Tensor lse, Tensor num_counted) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("router_losses_forward", TORCH_BOX(&router_losses_forward));
  m.impl("router_losses_backward", TORCH_BOX(&router_losses_backward));
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) {
  m.impl("router_losses_forward", TORCH_BOX(&router_losses_forward));
  m.impl("router_losses_backward", TORCH_BOX(&router_losses_backward));
}

}  // namespace arfast
