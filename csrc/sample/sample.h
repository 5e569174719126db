// Contract of sample: sizes, strides (in elements) and pointers shared by the binding and the implementations.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"
#include "core/logits_tiles.h"
#include "core/token_weights.h"
#include "sample/sample_state.h"

namespace arfast {

struct SampleParams {
  DType dtype;         // of logits
  int64_t num_rows;    // R
  int64_t vocab_size;  // V < 2^24
  const void* logits;  // [R, V]
  int64_t logits_stride;
  TokenFilters filters;
  int64_t* generator_state;  // [R, 3] of seed, sample, step; the step rises by 1
  int64_t state_stride;
  int64_t state_column_stride;
  int64_t* tokens;  // [R], dense
  float* logprobs;  // [R], dense
  // Of the CUDA implementation.
  void* workspace;        // sample_workspace_bytes(...)
  uint32_t* num_arrived;  // [R], 0
};

// sample_step: draws for the sequences that go on, and writes their state instead of tokens and logprobs.
struct SampleStepParams : SampleParams {
  SampleState state;
  const float* tile_sums;  // of the CPU implementation: [2, tiles, R], see core/logits_tiles.h; nullptr: none
};

// The tokens of a row that one block holds in registers: 32 for each of 256 threads, but for a vector that begins
// before them. From the tokens alone, so that logprobs have the same bits in every batch.
constexpr int64_t kSamplePartTokens = 256 * 32 - 8;
constexpr int64_t sample_parts(const SampleParams& params) {
  return (params.vocab_size + kSamplePartTokens - 1) / kSamplePartTokens;
}

// How many of a part's best tokens are listed: one more than top_k tells whether those left out could tie with the last
// one; none beyond what a block ranks quickly.
constexpr int64_t kSampleLongestTopK = 128;
constexpr int64_t sample_listed(const SampleParams& params) {
  const int64_t top_k = params.filters.top_k;
  return top_k > 0 && top_k <= kSampleLongestTopK ? top_k + 1 : 0;
}

// The best tokens of every part as 8-byte keys, then its sum as two floats.
constexpr int64_t sample_workspace_bytes(const SampleParams& params) {
  return params.num_rows * sample_parts(params) * (sample_listed(params) + 1) * 8;
}

ARFAST_CPU_FUNCTION(sample, SampleParams)
ARFAST_CPU_FUNCTION(sample_step, SampleStepParams)
ARFAST_CUDA_FUNCTION(sample, SampleParams)
ARFAST_CUDA_FUNCTION(sample_step, SampleStepParams)

}  // namespace arfast
