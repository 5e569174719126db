// Binding of speculative_verify: schema, checks, allocation and the choice of the implementation.
#include "speculative_verify/speculative_verify.h"

#include <optional>
#include <tuple>

#include "binding/tensor.h"
#include "binding/token_filters.h"

namespace arfast {
namespace {

constexpr const char* kOp = "speculative_verify";

void check_drafts(const Tensor& target_logits, const Tensor& draft_tokens, const std::optional<Tensor>& draft_logits) {
  const int64_t batch = target_logits.size(0), num_drafts = target_logits.size(1) - 1, vocab = target_logits.size(2);
  check_shape(kOp, "draft_tokens", draft_tokens, "[B, G]", {batch, num_drafts});
  check_dtype(kOp, "draft_tokens", draft_tokens, ScalarType::Long);
  check_same_device(kOp, "draft_tokens", draft_tokens, "target_logits", target_logits);
  if (!draft_logits) return;
  check_shape(kOp, "draft_logits", *draft_logits, "[B, G, V]", {batch, num_drafts, vocab});
  check_same_dtype(kOp, "draft_logits", *draft_logits, "target_logits", target_logits);
  check_same_device(kOp, "draft_logits", *draft_logits, "target_logits", target_logits);
}

// -> (tokens int64 [B, G + 1], num_accepted int32 [B], logprobs [B, G + 1])
std::tuple<Tensor, Tensor, Tensor> speculative_verify(Tensor target_logits, Tensor draft_tokens,
                                                      std::optional<Tensor> draft_logits, double temperature,
                                                      int64_t top_k, double top_p, double min_p,
                                                      Tensor generator_state) {
  check_shape(kOp, "target_logits", target_logits, "[B, G + 1, V]", {kAny, kAny, kAny});
  const DType dtype = float_dtype(kOp, "target_logits", target_logits);
  const int64_t batch = target_logits.size(0), num_positions = target_logits.size(1);
  if (num_positions < 1) fail(kOp, "target_logits", "have at least one position", shape_of(target_logits));
  check_vocab_size(kOp, "target_logits", target_logits);
  check_drafts(target_logits, draft_tokens, draft_logits);
  const TokenFilters filters = token_filters(kOp, temperature, top_k, top_p, min_p);
  check_generator_state(kOp, generator_state, "[B, 3]", "target_logits", target_logits);
  target_logits = with_dense_rows(target_logits);
  // The best token is drawn whatever the draft's distribution.
  if (draft_logits && filters.top_p == 0) draft_logits.reset();
  if (draft_logits) draft_logits = with_dense_rows(*draft_logits);

  Tensor tokens = new_empty(target_logits, {batch, num_positions}, ScalarType::Long);
  Tensor num_accepted = new_empty(target_logits, {batch}, ScalarType::Int);
  Tensor logprobs = new_empty(target_logits, {batch, num_positions}, ScalarType::Float);
  SpeculativeVerifyParams params{
      .dtype = dtype,
      .batch = batch,
      .num_drafts = num_positions - 1,
      .vocab_size = target_logits.size(2),
      .target_logits = target_logits.data_ptr(),
      .target_stride_batch = target_logits.stride(0),
      .target_stride_position = target_logits.stride(1),
      .draft_logits = pointer_or_null(draft_logits),
      .draft_stride_batch = stride_or_zero(draft_logits, 0),
      .draft_stride_position = stride_or_zero(draft_logits, 1),
      .draft_tokens = static_cast<const int64_t*>(draft_tokens.data_ptr()),
      .tokens_stride_batch = draft_tokens.stride(0),
      .tokens_stride_position = draft_tokens.stride(1),
      .filters = filters,
      .generator_state = static_cast<int64_t*>(generator_state.data_ptr()),
      .state_stride = generator_state.stride(0),
      .state_column_stride = generator_state.stride(1),
      .tokens = static_cast<int64_t*>(tokens.data_ptr()),
      .num_accepted = static_cast<int32_t*>(num_accepted.data_ptr()),
      .logprobs = static_cast<float*>(logprobs.data_ptr()),
      .rows = nullptr,
      .num_arrived = nullptr,
  };
  Tensor rows, num_arrived;
  if (!on_cpu(target_logits)) {
    const int64_t bytes = batch * speculative_verify_rows(params) * sizeof(SpeculativeVerifyRow);
    rows = new_empty(target_logits, {bytes}, ScalarType::Byte);
    num_arrived = new_zeros(target_logits, {batch}, ScalarType::Int);
    params.rows = static_cast<SpeculativeVerifyRow*>(rows.data_ptr());
    params.num_arrived = static_cast<uint32_t*>(num_arrived.data_ptr());
  }
  run(kOp, target_logits, params, speculative_verify_cpu, speculative_verify_cuda);
  return {tokens, num_accepted, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "speculative_verify(Tensor target_logits, Tensor draft_tokens, Tensor? draft_logits, float temperature, "
      "int top_k, float top_p, float min_p, Tensor(a!) generator_state) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("speculative_verify", TORCH_BOX(&speculative_verify)); }
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) { m.impl("speculative_verify", TORCH_BOX(&speculative_verify)); }

}  // namespace arfast
