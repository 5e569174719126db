// What the parts of the backward pass on the GPU share.
#pragma once

#include "attention/attention_cuda.cuh"

namespace arfast {

// What a score's gradient needs of its query.
struct RowTerms {
  float lse;    // in units of log 2; inf for a row that saw nothing: its weights are 0
  float delta;  // dout . out - dlse
};

// Before the products: the terms of every row.
const char* launch_attention_row_terms(const AttentionBackwardParams& params, void* stream);
// After them: dq from its sums, and dsink.
const char* launch_attention_query_gradient(const AttentionBackwardParams& params, void* stream);
const char* launch_attention_sink_gradient(const AttentionBackwardParams& params, void* stream);

}  // namespace arfast
