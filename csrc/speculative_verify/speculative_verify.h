// Contract of speculative_verify: sizes, strides (in elements) and pointers shared by the binding and the
// implementations.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"
#include "core/token_weights.h"

namespace arfast {

// What the CUDA implementation finds out about a row of logits.
struct SpeculativeVerifyRow {
  float max;
  float sum;          // of exp(x - max)
  uint64_t smallest;  // rank of a token that the filters keep, but for min_p
  uint64_t mass;      // of what they keep
  uint64_t drafted;   // weight of the draft
};

struct SpeculativeVerifyParams {
  DType dtype;                // of target_logits and draft_logits
  int64_t batch;              // B
  int64_t num_drafts;         // G
  int64_t vocab_size;         // V < 2^24
  const void* target_logits;  // [B, G + 1, V]
  int64_t target_stride_batch;
  int64_t target_stride_position;
  const void* draft_logits;  // [B, G, V]; nullptr: every draft had probability 1
  int64_t draft_stride_batch;
  int64_t draft_stride_position;
  // [B, G]: the drafts of a row end at the first token outside [0, V).
  const int64_t* draft_tokens;
  int64_t tokens_stride_batch;
  int64_t tokens_stride_position;
  TokenFilters filters;
  int64_t* generator_state;  // [B, 3] of seed, sample, step; the step rises by the number of new tokens
  int64_t state_stride;
  int64_t state_column_stride;
  int64_t* tokens;        // [B, G + 1], dense
  int32_t* num_accepted;  // [B], dense
  float* logprobs;        // [B, G + 1], dense
  // Of the CUDA implementation.
  SpeculativeVerifyRow* rows;  // [B, speculative_verify_rows(...)]
  uint32_t* num_arrived;       // [B], 0
};

// Of one sequence: the target's, then the draft's.
constexpr int64_t speculative_verify_rows(const SpeculativeVerifyParams& params) {
  return params.num_drafts + 1 + (params.draft_logits != nullptr ? params.num_drafts : 0);
}

// At a position of a sequence; -1: none.
static constexpr int64_t draft_token(const SpeculativeVerifyParams& params, int64_t b, int64_t position) {
  if (position == params.num_drafts) return -1;
  const int64_t offset = b * params.tokens_stride_batch + position * params.tokens_stride_position;
  const int64_t token = params.draft_tokens[offset];
  return 0 <= token && token < params.vocab_size ? token : -1;
}

ARFAST_CPU_FUNCTION(speculative_verify, SpeculativeVerifyParams)
ARFAST_CUDA_FUNCTION(speculative_verify, SpeculativeVerifyParams)

}  // namespace arfast
