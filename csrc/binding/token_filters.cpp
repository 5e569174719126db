// The arguments that all ops which draw tokens share: see token_filters.h.
#include "binding/token_filters.h"

#include <cmath>

namespace arfast {

TokenFilters token_filters(const char* op, double temperature, int64_t top_k, double top_p, double min_p) {
  check_range(op, "temperature", temperature, temperature >= 0 && std::isfinite(static_cast<float>(temperature)),
              "be at least 0 and a finite float32");
  if (top_k < 0) fail(op, "top_k", "be at least 0", std::to_string(top_k));
  check_range(op, "top_p", top_p, top_p >= 0 && top_p <= 1, "be in [0, 1]");
  check_range(op, "min_p", min_p, min_p >= 0 && min_p <= 1, "be in [0, 1]");
  const bool greedy = static_cast<float>(temperature) == 0;
  return {
      .temperature = greedy ? 1.0f : static_cast<float>(temperature),
      .top_k = greedy ? 1 : top_k,
      .top_p = greedy ? 0 : top_p,
      .min_weight = static_cast<uint64_t>(std::ceil(min_p * 0x1p40)),
  };
}

void check_generator_state(const char* op, const Tensor& state, const char* names, const char* logits_name,
                           const Tensor& logits) {
  check_shape(op, "generator_state", state, names, {logits.size(0), 3});
  check_dtype(op, "generator_state", state, ScalarType::Long);
  check_same_device(op, "generator_state", state, logits_name, logits);
  if (state.size(0) > 1 && (state.stride(0) == 0 || state.stride(1) == 0)) {
    fail(op, "generator_state", "have memory for every element", "a stride of 0");
  }
}

void check_vocab_size(const char* op, const char* argument, const Tensor& logits) {
  const int64_t vocab_size = logits.size(logits.dim() - 1);
  if (vocab_size < 1 || vocab_size >= int64_t{1} << 24) fail(op, argument, "have 1 <= V < 2^24", shape_of(logits));
}

}  // namespace arfast
