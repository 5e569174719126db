// Binding of decode_beams: steps of a model and of a beam search in turn, without a word to Python between them.
#include "beam_prune/beam_state.h"
#include "binding/decoding.h"

namespace arfast {
namespace {

constexpr const char* kOp = "decode_beams";

// Whether an item can still change, and no logits were broken.
bool goes_on(const Tensor& status) {
  constexpr int32_t kGoesOn = kBeamsCanChange | kBeamsGoOn;
  const int32_t* items = static_cast<const int32_t*>(status.data_ptr());
  bool any = false;
  for (int64_t i = 0; i < status.numel(); ++i) {
    if (items[i] & kBeamsNotFinite) return false;
    any |= (items[i] & kGoesOn) == kGoesOn;
  }
  return any;
}

// -> the number of steps taken
int64_t decode_beams(int64_t steps, std::vector<Tensor> weights, Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache,
                     Tensor seqlens, std::vector<int64_t> windows, int64_t num_heads, double eps, bool qkv_bias,
                     bool o_bias, bool qk_norm, Tensor ends, Tensor length_powers, int64_t early_stopping,
                     bool longest_counts, Tensor lengths, Tensor running, Tensor parents, Tensor tokens,
                     Tensor token_log_probs, Tensor scores, Tensor endings, Tensor ending_log_probs, Tensor improvable,
                     Tensor status, Tensor next_tokens, Tensor rows, Tensor slots, Tensor prompt_lengths,
                     std::optional<Tensor> own_slots) {
  if (steps < 1) fail(kOp, "steps", "be at least 1", std::to_string(steps));
  int64_t done = 0;
  do {
    const auto [logits, tile_sums] = decode_step(next_tokens, weights, cos, sin, k_cache, v_cache, seqlens, slots,
                                                 windows, num_heads, eps, qkv_bias, o_bias, qk_norm, true, true);
    beam_step(logits, std::nullopt, false, ends, length_powers, early_stopping, longest_counts, 0, lengths, running,
              parents, tokens, token_log_probs, scores, endings, ending_log_probs, improvable, status, next_tokens,
              rows, slots, prompt_lengths, own_slots, std::nullopt, tile_sums);
  } while (++done < steps && goes_on(status));
  return done;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "decode_beams(int steps, Tensor[] weights, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!) seqlens, int[] windows, int num_heads, float eps, bool qkv_bias, bool o_bias, bool qk_norm, "
      "Tensor ends, Tensor length_powers, int early_stopping, bool longest_counts, Tensor(d!) lengths, "
      "Tensor(e!) running, Tensor(f!) parents, Tensor(g!) tokens, Tensor(h!) token_log_probs, Tensor(i!) scores, "
      "Tensor(j!) endings, Tensor(k!) ending_log_probs, Tensor(l!) improvable, Tensor(m!) status, "
      "Tensor(n!) next_tokens, Tensor(o!) rows, Tensor(p!) slots, Tensor prompt_lengths, Tensor? own_slots) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("decode_beams", TORCH_BOX(&decode_beams)); }

}  // namespace arfast
