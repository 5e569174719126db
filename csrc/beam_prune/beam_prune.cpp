// Bindings of beam_prune and beam_step: schemas, checks, allocation and the choice of the implementation.
#include "beam_prune/beam_prune.h"

#include <algorithm>
#include <limits>

#include "binding/decoding.h"

namespace arfast {
namespace {

// The checked arguments and the results of a pruning.
struct Pruning {
  const char* op;
  Tensor logits, scores;
  std::optional<Tensor> banned;
  int64_t num_candidates;
  bool log_probs;
  int64_t* generator_state = nullptr;
  const float* tile_sums = nullptr;
  Tensor out_scores, parents, tokens, lse;

  Pruning(const char* op, const Tensor& logits, const Tensor& scores, int64_t num_candidates,
          const std::optional<Tensor>& banned, bool log_probs)
      : op(op), logits(logits), scores(scores), banned(banned), num_candidates(num_candidates), log_probs(log_probs) {
    check_and_prepare();
    const int64_t groups = scores.size(0);
    out_scores = new_empty(scores, {groups, num_candidates}, ScalarType::Float);
    parents = new_empty(scores, {groups, num_candidates}, ScalarType::Int);
    tokens = new_empty(scores, {groups, num_candidates}, ScalarType::Int);
    lse = new_empty(scores, {groups, scores.size(1)}, ScalarType::Float);
  }

  void run(const BeamState& state) const {
    BeamPruneParams params{
        .dtype = float_dtype(op, "logits", logits),
        .num_groups = scores.size(0),
        .num_beams = scores.size(1),
        .vocab_size = logits.size(1),
        .num_candidates = num_candidates,
        .logits = logits.data_ptr(),
        .scores = static_cast<const float*>(scores.data_ptr()),
        .banned = static_cast<const bool*>(pointer_or_null(banned)),
        .logits_stride = logits.stride(0),
        .banned_stride = banned && banned->dim() == 2 && banned->size(0) > 1 ? banned->stride(0) : 0,
        .log_probs = log_probs,
        .out_scores = static_cast<float*>(out_scores.data_ptr()),
        .parents = static_cast<int32_t*>(parents.data_ptr()),
        .tokens = static_cast<int32_t*>(tokens.data_ptr()),
        .lse = static_cast<float*>(lse.data_ptr()),
        .generator_state = generator_state,
        .tile_sums = tile_sums,
        .num_parts = 0,
        .part_vectors = 0,
        .workspace = nullptr,
        .num_arrived = nullptr,
        .state = state,
    };
    Tensor workspace, num_arrived;
    if (!on_cpu(logits)) {
      choose_beam_prune_parts(logits.element_size(), params);
      workspace = new_empty(logits, {beam_prune_workspace_bytes(params)}, ScalarType::Byte);
      num_arrived = new_zeros(logits, {params.num_groups}, ScalarType::Int);
      params.workspace = workspace.data_ptr();
      params.num_arrived = static_cast<uint32_t*>(num_arrived.data_ptr());
    }
    arfast::run(op, logits, params, beam_prune_cpu, beam_prune_cuda);
  }

 private:
  void check_and_prepare() {
    check_shape(op, "scores", scores, "[B, K]", {kAny, kAny});
    check_dtype(op, "scores", scores, ScalarType::Float);
    const int64_t groups = scores.size(0), beams = scores.size(1);
    if (beams < 1) fail(op, "scores", "have K >= 1 beams per group", shape_of(scores));
    check_shape(op, "logits", logits, "[B*K, V]", {groups * beams, kAny});
    float_dtype(op, "logits", logits);
    const int64_t vocab_size = logits.size(1);
    constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
    if (vocab_size < 1 || vocab_size > kLargest / beams) {
      fail(op, "logits", "have 1 <= V and K * V < 2^31", shape_of(logits));
    }
    check_same_device(op, "scores", scores, "logits", logits);
    if (num_candidates < 1) fail(op, "num_candidates", "be at least 1", std::to_string(num_candidates));
    if (banned) {
      if (banned->dim() == 1) {
        check_shape(op, "banned", *banned, "[V]", {vocab_size});
      } else {
        const int64_t rows = banned->dim() == 2 && banned->size(0) == 1 ? 1 : logits.size(0);
        check_shape(op, "banned", *banned, "[B*K, V]", {rows, vocab_size});
      }
      check_dtype(op, "banned", *banned, ScalarType::Bool);
      check_same_device(op, "banned", *banned, "logits", logits);
      banned = with_dense_rows(*banned);
    }
    logits = with_dense_rows(logits);
    scores = to_contiguous(scores);
  }
};

// -> (scores [B, M], parents int32 [B, M], tokens int32 [B, M], lse [B, K])
std::tuple<Tensor, Tensor, Tensor, Tensor> beam_prune(Tensor logits, Tensor scores, int64_t num_candidates,
                                                      std::optional<Tensor> banned, bool log_probs) {
  const Pruning pruning("beam_prune", logits, scores, num_candidates, banned, log_probs);
  pruning.run({});
  return {pruning.out_scores, pruning.parents, pruning.tokens, pruning.lse};
}

}  // namespace

void beam_step(Tensor logits, std::optional<Tensor> banned, bool log_probs, Tensor ends, Tensor length_powers,
               int64_t early_stopping, bool longest_counts, int64_t min_length, Tensor lengths, Tensor running,
               Tensor parents, Tensor tokens, Tensor token_log_probs, Tensor scores, Tensor endings,
               Tensor ending_log_probs, Tensor improvable, Tensor status, Tensor next_tokens, Tensor rows,
               std::optional<Tensor> slots, std::optional<Tensor> prompt_lengths, std::optional<Tensor> own_slots,
               std::optional<Tensor> generator_state, std::optional<Tensor> tile_sums) {
  constexpr const char* kOp = "beam_step";
  check_shape(kOp, "logits", logits, "[B*K, V]", {kAny, kAny});
  check_shape(kOp, "running", running, "[B, K]", {kAny, kAny});
  const int64_t groups = running.size(0), beams = running.size(1);
  if (beams < 1 || beams > kMaxStateBeams) fail(kOp, "running", "have 1 to 128 beams per group", shape_of(running));
  check_shape(kOp, "ends", ends, "[number of end tokens]", {kAny});
  const int64_t num_ends = ends.size(0);
  if (num_ends > kMaxStateEnds) fail(kOp, "ends", "have at most 8 tokens", shape_of(ends));
  check_shape(kOp, "parents", parents, "[L, B, K]", {kAny, groups, beams});
  const int64_t length = parents.size(0);
  if (length < 1) fail(kOp, "parents", "have room for a step", shape_of(parents));
  check_range(kOp, "early_stopping", early_stopping, 0 <= early_stopping && early_stopping <= 2, "be 0, 1 or 2");
  if (min_length < 0) fail(kOp, "min_length", "be at least 0", std::to_string(min_length));
  const bool first = logits.size(0) == groups && beams > 1;  // one row per group, which all its beams continue
  if (!first && logits.size(0) != groups * beams) {
    fail(kOp, "logits", "have B*K rows, or B in the first step", shape_of(logits));
  }
  if (slots.has_value() != prompt_lengths.has_value()) fail(kOp, "slots", "come with prompt_lengths", "one of both");
  if (own_slots && !slots) fail(kOp, "own_slots", "come with slots", "them alone");

  BeamState state{
      .num_beams = beams,
      .max_length = length,
      .min_length = min_length,
      .num_ends = num_ends,
      .ends = state_data<int64_t>(kOp, "ends", ends, "[number of end tokens]", {num_ends}, logits),
      .length_powers = state_data<float>(kOp, "length_powers", length_powers, "[L + 1]", {length + 1}, logits),
      .early_stopping = static_cast<EarlyStopping>(early_stopping),
      .longest_counts = longest_counts,
      .lengths = state_data<int32_t>(kOp, "lengths", lengths, "[B]", {groups}, logits),
      .running = state_data<float>(kOp, "running", running, "[B, K]", {groups, beams}, logits),
      .parents = state_data<int32_t>(kOp, "parents", parents, "[L, B, K]", {length, groups, beams}, logits),
      .tokens = state_data<int32_t>(kOp, "tokens", tokens, "[L, B, K]", {length, groups, beams}, logits),
      .log_probs = state_data<float>(kOp, "log_probs", token_log_probs, "[L, B, K]", {length, groups, beams}, logits),
      .scores = state_data<float>(kOp, "scores", scores, "[B, K]", {groups, beams}, logits),
      .endings = state_data<int32_t>(kOp, "endings", endings, "[B, K, 3]", {groups, beams, 3}, logits),
      .ending_log_probs =
          state_data<float>(kOp, "ending_log_probs", ending_log_probs, "[B, K]", {groups, beams}, logits),
      .improvable = state_data<bool>(kOp, "improvable", improvable, "[B]", {groups}, logits),
      .status = state_data<int32_t>(kOp, "status", status, "[B]", {groups}, logits),
      .next_tokens = state_data<int64_t>(kOp, "next_tokens", next_tokens, "[B*K]", {groups * beams}, logits),
      .rows = state_data<int64_t>(kOp, "rows", rows, "[B*K]", {groups * beams}, logits),
      .slots = nullptr,
      .cache_length = 0,
      .prompt_lengths = nullptr,
      .own_slots = nullptr,
  };
  if (slots) {
    state.slots = state_data<int32_t>(kOp, "slots", *slots, "[B*K, S]", {groups * beams, kAny}, logits);
    state.cache_length = slots->size(1);
    state.prompt_lengths = state_data<int32_t>(kOp, "prompt_lengths", *prompt_lengths, "[B]", {groups}, logits);
  }
  if (own_slots) state.own_slots = state_data<int32_t>(kOp, "own_slots", *own_slots, "[B*K]", {groups * beams}, logits);
  const Tensor so_far = first ? torch::stable::narrow(running, 1, 0, 1) : running;
  const int64_t num_candidates = std::max<int64_t>(2, 1 + num_ends) * beams;  // leaves K that do not end
  Pruning pruning(kOp, logits, so_far, num_candidates, banned, log_probs);
  if (generator_state) {
    pruning.generator_state =
        state_data<int64_t>(kOp, "generator_state", *generator_state, "[B, 3]", {groups, 3}, logits);
  }
  if (tile_sums) {
    if (banned || log_probs || generator_state || min_length > 0 || !on_cpu(logits)) {
      fail(kOp, "tile_sums", "come without banned, log_probs, generator_state and min_length, on the CPU",
           "one of them");
    }
    const int64_t tiles = num_logits_tiles(logits.size(1));
    pruning.tile_sums =
        state_data<float>(kOp, "tile_sums", *tile_sums, "[2, tiles, B*K]", {2, tiles, logits.size(0)}, logits);
  }
  pruning.run(state);
}

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "beam_prune(Tensor logits, Tensor scores, int num_candidates, Tensor? banned, bool log_probs) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "beam_step(Tensor logits, Tensor? banned, bool log_probs, Tensor ends, Tensor length_powers, int early_stopping, "
      "bool longest_counts, int min_length, Tensor(a!) lengths, Tensor(b!) running, Tensor(c!) parents, "
      "Tensor(d!) tokens, Tensor(e!) token_log_probs, Tensor(f!) scores, Tensor(g!) endings, "
      "Tensor(n!) ending_log_probs, Tensor(h!) improvable, Tensor(i!) status, Tensor(j!) next_tokens, "
      "Tensor(k!) rows, Tensor(l!)? slots, Tensor? prompt_lengths, Tensor? own_slots, "
      "Tensor(m!)? generator_state, Tensor? tile_sums=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("beam_prune", TORCH_BOX(&beam_prune));
  m.impl("beam_step", TORCH_BOX(&beam_step));
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) {
  m.impl("beam_prune", TORCH_BOX(&beam_prune));
  m.impl("beam_step", TORCH_BOX(&beam_step));
}

}  // namespace arfast
