// The arguments that all ops which draw tokens share.
#pragma once

#include "binding/tensor.h"
#include "core/token_weights.h"

namespace arfast {

// Checked; temperature 0 becomes the filters of greedy decoding.
TokenFilters token_filters(const char* op, double temperature, int64_t top_k, double top_p, double min_p);

// int64 [rows, 3], one row for each of `logits` and on their device, every element in memory of its own. `names` is its
// shape in words.
void check_generator_state(const char* op, const Tensor& state, const char* names, const char* logits_name,
                           const Tensor& logits);

void check_vocab_size(const char* op, const char* argument, const Tensor& logits);

}  // namespace arfast
