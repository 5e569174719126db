// Bindings of decoding that other bindings call (see decode_step.cpp, beam_prune.cpp and sample.cpp), and what those
// with a state share.
#pragma once

#include <tuple>
#include <type_traits>
#include <vector>

#include "binding/tensor.h"

namespace arfast {

template <typename T>
constexpr ScalarType kScalarType = std::is_same_v<T, float>     ? ScalarType::Float
                                   : std::is_same_v<T, int32_t> ? ScalarType::Int
                                   : std::is_same_v<T, int64_t> ? ScalarType::Long
                                                                : ScalarType::Bool;

// A tensor of a state: of this shape and type, dense, with the logits.
template <typename T>
T* state_data(const char* op, const char* name, const Tensor& tensor, const char* shape,
              std::initializer_list<int64_t> sizes, const Tensor& logits) {
  check_shape(op, name, tensor, shape, sizes);
  check_dtype(op, name, tensor, kScalarType<T>);
  check_same_device(op, name, tensor, "logits", logits);
  if (!tensor.is_contiguous()) fail(op, name, "be contiguous", "strides of " + shape_of(tensor));
  return static_cast<T*>(tensor.data_ptr());
}

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

void sample_step(Tensor logits, double temperature, int64_t top_k, double top_p, double min_p, Tensor generator_state,
                 Tensor ends, int64_t pad_token, Tensor lengths, Tensor tokens, Tensor log_probs, Tensor status,
                 Tensor next_tokens, std::optional<Tensor> tile_sums);

}  // namespace arfast
