// The state of sequences that grow by a drawn token in every step, which a step updates where it stands, on every
// device.
#pragma once

#include <cstdint>

namespace arfast {

// Flags of a sequence.
constexpr int32_t kSampleGoesOn = 1;
constexpr int32_t kSampleNotFinite = 2;  // its logits had no finite log-sum-exp, and it has ended

// Of R sequences, all in the memory of the device.
struct SampleState {
  int64_t max_length;  // L
  int64_t num_ends;
  const int64_t* ends;  // [num_ends], the tokens that end a sequence
  int64_t pad_token;    // what one that has ended is fed with
  int32_t* lengths;     // [R]
  int64_t* tokens;      // [R, L]
  int64_t tokens_stride;
  float* log_probs;      // [R, L], dense
  int32_t* status;       // [R]
  int64_t* next_tokens;  // [R], to be fed to the model
};

// Whether a sequence takes a token in this step.
static constexpr bool goes_on(const SampleState& state, int64_t row) {
  return (state.status[row] & kSampleGoesOn) != 0 && state.lengths[row] >= 0 && state.lengths[row] < state.max_length;
}

// What has ended stays as it is.
static constexpr void feed_padding(const SampleState& state, int64_t row) { state.next_tokens[row] = state.pad_token; }

static constexpr void append(const SampleState& state, int64_t row, int64_t token, float log_prob) {
  const int64_t length = state.lengths[row];
  const bool finite = log_prob == log_prob;
  bool ends = length + 1 == state.max_length || !finite;
  for (int64_t i = 0; i < state.num_ends; ++i) ends |= state.ends[i] == token;
  state.tokens[row * state.tokens_stride + length] = token;
  state.log_probs[row * state.max_length + length] = log_prob;
  state.lengths[row] = static_cast<int32_t>(length + 1);
  state.status[row] = (ends ? 0 : kSampleGoesOn) | (finite ? 0 : kSampleNotFinite);
  state.next_tokens[row] = token;
}

}  // namespace arfast
