// Binding of beam_prune: schema, checks, allocation and the choice of the implementation.
#include "beam_prune/beam_prune.h"

#include <limits>
#include <tuple>

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "beam_prune";

// -> (scores [B, M], parents int32 [B, M], tokens int32 [B, M], lse [B, K])
std::tuple<Tensor, Tensor, Tensor, Tensor> beam_prune(Tensor logits, Tensor scores, int64_t num_candidates,
                                                      std::optional<Tensor> banned) {
  check_shape(kOp, "scores", scores, "[B, K]", {kAny, kAny});
  check_dtype(kOp, "scores", scores, ScalarType::Float);
  const int64_t groups = scores.size(0), beams = scores.size(1);
  if (beams < 1) fail(kOp, "scores", "have K >= 1 beams per group", shape_of(scores));
  check_shape(kOp, "logits", logits, "[B*K, V]", {groups * beams, kAny});
  const DType dtype = float_dtype(kOp, "logits", logits);
  const int64_t vocab_size = logits.size(1);
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  if (vocab_size < 1 || vocab_size > kLargest / beams) {
    fail(kOp, "logits", "have 1 <= V and K * V < 2^31", shape_of(logits));
  }
  check_same_device(kOp, "scores", scores, "logits", logits);
  if (num_candidates < 1) fail(kOp, "num_candidates", "be at least 1", std::to_string(num_candidates));
  if (banned) {
    check_shape(kOp, "banned", *banned, "[B*K, V]", {logits.size(0), vocab_size});
    check_dtype(kOp, "banned", *banned, ScalarType::Bool);
    check_same_device(kOp, "banned", *banned, "logits", logits);
    banned = with_dense_rows(*banned);
  }
  logits = with_dense_rows(logits);
  scores = to_contiguous(scores);

  Tensor out_scores = new_empty(scores, {groups, num_candidates}, ScalarType::Float);
  Tensor parents = new_empty(scores, {groups, num_candidates}, ScalarType::Int);
  Tensor tokens = new_empty(scores, {groups, num_candidates}, ScalarType::Int);
  Tensor lse = new_empty(scores, {groups, beams}, ScalarType::Float);
  BeamPruneParams params{
      .dtype = dtype,
      .num_groups = groups,
      .num_beams = beams,
      .vocab_size = vocab_size,
      .num_candidates = num_candidates,
      .logits = logits.data_ptr(),
      .scores = static_cast<const float*>(scores.data_ptr()),
      .banned = static_cast<const bool*>(pointer_or_null(banned)),
      .logits_stride = logits.stride(0),
      .banned_stride = stride_or_zero(banned, 0),
      .out_scores = static_cast<float*>(out_scores.data_ptr()),
      .parents = static_cast<int32_t*>(parents.data_ptr()),
      .tokens = static_cast<int32_t*>(tokens.data_ptr()),
      .lse = static_cast<float*>(lse.data_ptr()),
      .num_parts = 0,
      .part_vectors = 0,
      .workspace = nullptr,
      .num_arrived = nullptr,
  };
  Tensor workspace, num_arrived;
  if (!on_cpu(logits)) {
    choose_beam_prune_parts(logits.element_size(), params);
    workspace = new_empty(logits, {beam_prune_workspace_bytes(params)}, ScalarType::Byte);
    num_arrived = new_zeros(logits, {groups}, ScalarType::Int);
    params.workspace = workspace.data_ptr();
    params.num_arrived = static_cast<uint32_t*>(num_arrived.data_ptr());
  }
  run(kOp, logits, params, beam_prune_cpu, beam_prune_cuda);
  return {out_scores, parents, tokens, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "beam_prune(Tensor logits, Tensor scores, int num_candidates, Tensor? banned) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("beam_prune", TORCH_BOX(&beam_prune)); }
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) { m.impl("beam_prune", TORCH_BOX(&beam_prune)); }

}  // namespace arfast
