// Binding of beam_hypotheses: schema, checks, allocation and the choice of the implementation.
#include "beam_hypotheses/beam_hypotheses.h"

#include <tuple>

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "beam_hypotheses";

// -> (tokens int64 [B * n, L], log_probs [B * n, L], lengths int32 [B * n])
std::tuple<Tensor, Tensor, Tensor> beam_hypotheses(Tensor parents, Tensor tokens, Tensor log_probs, Tensor endings,
                                                   Tensor ending_log_probs, int64_t num_hypotheses, int64_t pad_token) {
  parents =
      checked_dense(kOp, "parents", parents, "[L, B, K]", {kAny, kAny, kAny}, ScalarType::Int, "parents", parents);
  const int64_t length = parents.size(0), groups = parents.size(1), beams = parents.size(2);
  check(beams <= kMaxHypothesesBeams, kOp, "parents", "have at most 256 beams per group", shape_of(parents));
  tokens =
      checked_dense(kOp, "tokens", tokens, "[L, B, K]", {length, groups, beams}, ScalarType::Int, "parents", parents);
  log_probs = checked_dense(kOp, "log_probs", log_probs, "[L, B, K]", {length, groups, beams}, ScalarType::Float,
                            "parents", parents);
  endings =
      checked_dense(kOp, "endings", endings, "[B, K, 3]", {groups, beams, 3}, ScalarType::Int, "parents", parents);
  ending_log_probs = checked_dense(kOp, "ending_log_probs", ending_log_probs, "[B, K]", {groups, beams},
                                   ScalarType::Float, "parents", parents);
  check(num_hypotheses >= 1 && num_hypotheses <= beams, kOp, "num_return_sequences",
        ("be in [1, " + std::to_string(beams) + "], the number of beams").c_str(), std::to_string(num_hypotheses));
  const int64_t rows = groups * num_hypotheses;
  Tensor out = new_empty(parents, {rows, length}, ScalarType::Long);
  Tensor out_log_probs = new_empty(parents, {rows, length}, ScalarType::Float);
  Tensor lengths = new_empty(parents, {rows}, ScalarType::Int);
  const BeamHypothesesParams params{
      .num_groups = groups,
      .num_beams = beams,
      .max_length = length,
      .num_hypotheses = num_hypotheses,
      .pad_token = pad_token,
      .parents = static_cast<const int32_t*>(parents.data_ptr()),
      .tokens = static_cast<const int32_t*>(tokens.data_ptr()),
      .log_probs = static_cast<const float*>(log_probs.data_ptr()),
      .endings = static_cast<const int32_t*>(endings.data_ptr()),
      .ending_log_probs = static_cast<const float*>(ending_log_probs.data_ptr()),
      .hypotheses = static_cast<int64_t*>(out.data_ptr()),
      .hypotheses_log_probs = static_cast<float*>(out_log_probs.data_ptr()),
      .lengths = static_cast<int32_t*>(lengths.data_ptr()),
  };
  if (rows > 0) run(kOp, parents, params, beam_hypotheses_cpu, beam_hypotheses_cuda);
  return {out, out_log_probs, lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "beam_hypotheses(Tensor parents, Tensor tokens, Tensor log_probs, Tensor endings, Tensor ending_log_probs, int "
      "num_return_sequences, int pad_token_id) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("beam_hypotheses", TORCH_BOX(&beam_hypotheses)); }
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) { m.impl("beam_hypotheses", TORCH_BOX(&beam_hypotheses)); }

}  // namespace arfast
