// Binding of decode_samples: steps of a model and draws of tokens in turn, without a word to Python between them.
#include "binding/decoding.h"
#include "sample/sample_state.h"

namespace arfast {
namespace {

constexpr const char* kOp = "decode_samples";

// Whether a sequence can still grow, and no logits were broken.
bool goes_on(const Tensor& status) {
  const int32_t* rows = static_cast<const int32_t*>(status.data_ptr());
  bool any = false;
  for (int64_t row = 0; row < status.numel(); ++row) {
    if (rows[row] & kSampleNotFinite) return false;
    any |= (rows[row] & kSampleGoesOn) != 0;
  }
  return any;
}

// -> the number of steps taken
int64_t decode_samples(int64_t steps, std::vector<Tensor> weights, Tensor cos, Tensor sin, Tensor k_cache,
                       Tensor v_cache, Tensor seqlens, std::optional<Tensor> beam_slots, std::vector<int64_t> windows,
                       int64_t num_heads, double eps, bool qkv_bias, bool o_bias, bool qk_norm, double temperature,
                       int64_t top_k, double top_p, double min_p, Tensor generator_state, Tensor ends,
                       int64_t pad_token, Tensor lengths, Tensor tokens, Tensor log_probs, Tensor status,
                       Tensor next_tokens) {
  if (steps < 1) fail(kOp, "steps", "be at least 1", std::to_string(steps));
  int64_t done = 0;
  do {
    const auto [logits, tile_sums] = decode_step(next_tokens, weights, cos, sin, k_cache, v_cache, seqlens, beam_slots,
                                                 windows, num_heads, eps, qkv_bias, o_bias, qk_norm, true, true);
    sample_step(logits, temperature, top_k, top_p, min_p, generator_state, ends, pad_token, lengths, tokens, log_probs,
                status, next_tokens, tile_sums);
  } while (++done < steps && goes_on(status));
  return done;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "decode_samples(int steps, Tensor[] weights, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!) seqlens, Tensor? beam_slots, int[] windows, int num_heads, float eps, bool qkv_bias, bool o_bias, "
      "bool qk_norm, float temperature, int top_k, float top_p, float min_p, Tensor(d!) generator_state, Tensor ends, "
      "int pad_token, Tensor(e!) lengths, Tensor(f!) tokens, Tensor(g!) log_probs, Tensor(h!) status, "
      "Tensor(i!) next_tokens) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("decode_samples", TORCH_BOX(&decode_samples)); }

}  // namespace arfast
