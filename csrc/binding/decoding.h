// Bindings of decoding that other bindings call: see decode_step.cpp and beam_prune.cpp.
#pragma once

#include <tuple>
#include <vector>

#include "binding/tensor.h"

namespace arfast {

// -> (logits [B, V], or [B, T, V] for tokens [B, T]; tile_sums [2, tiles, ...], or [0] if they are not wanted)
std::tuple<Tensor, Tensor> decode_step(Tensor tokens, std::vector<Tensor> weights, Tensor cos, Tensor sin,
                                       Tensor k_cache, Tensor v_cache, Tensor seqlens, std::optional<Tensor> beam_slots,
                                       std::vector<int64_t> windows, int64_t num_heads, double eps, bool qkv_bias,
                                       bool o_bias, bool qk_norm, bool advance, bool with_tile_sums);

void beam_step(Tensor logits, std::optional<Tensor> banned, bool log_probs, Tensor ends, Tensor length_powers,
               int64_t early_stopping, bool longest_counts, int64_t min_length, Tensor lengths, Tensor running,
               Tensor parents, Tensor tokens, Tensor token_log_probs, Tensor scores, Tensor endings,
               Tensor ending_log_probs, Tensor improvable, Tensor status, Tensor next_tokens, Tensor rows,
               std::optional<Tensor> slots, std::optional<Tensor> prompt_lengths, std::optional<Tensor> own_slots,
               std::optional<Tensor> generator_state, std::optional<Tensor> tile_sums);

}  // namespace arfast
