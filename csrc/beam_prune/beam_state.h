// Contract of the state of a beam search, which a step updates where it stands: append-only back-pointers, and a
// finished hypothesis as the place in them where it ended, so that no sequence is copied while the search runs.
#pragma once

#include <cstdint>

namespace arfast {

constexpr int64_t kMaxStateBeams = 128;
constexpr int64_t kMaxStateEnds = 8;
constexpr int64_t kMaxStateCandidates = (1 + kMaxStateEnds) * kMaxStateBeams;

enum class EarlyStopping : int64_t { kFalse, kTrue, kNever };

// Of B groups with K beams. Everything is dense and in the memory of the device.
struct BeamState {
  int64_t num_beams;   // K
  int64_t max_length;  // L
  int64_t min_length;  // no token ends a hypothesis before it has as many
  int64_t num_ends;
  const int64_t* ends;         // [num_ends], the tokens that end a hypothesis
  const float* length_powers;  // [L + 1]: length^length_penalty; the first is not read
  EarlyStopping early_stopping;
  bool longest_counts;            // whether a beam is judged by the length L instead of its own
  int32_t* lengths;               // [B], tokens generated so far
  float* running;                 // [B, K], the scores of the beams, descending
  int32_t* parents;               // [L, B, K], the beam that a beam continues
  int32_t* tokens;                // [L, B, K]
  float* log_probs;               // [L, B, K], of the tokens
  float* scores;                  // [B, K], of the finished hypotheses, descending
  int32_t* endings;               // [B, K, 3]: (the last step or -1 for none, the beam it continues, the token)
  float* ending_log_probs;        // [B, K], of these tokens
  bool* improvable;               // [B], once false it stays false
  int32_t* status;                // [B], the flags below
  int64_t* next_tokens;           // [B * K], to be fed to the model
  int64_t* rows;                  // [B * K], the row of the logits that each continues
  int32_t* slots;                 // [B * K, S] or nullptr: the slot of the cache that holds each position of a beam
  int64_t cache_length;           // S
  const int32_t* prompt_lengths;  // [B]: the first generated token is at this position
  const int32_t* own_slots;       // [B * K] or nullptr: the slot for the next token of a beam; else its row
};

// Flags of a group after a step.
constexpr int32_t kBeamsCanChange = 1;  // a further step could change its hypotheses
constexpr int32_t kBeamsGoOn = 2;       // a candidate did not end
// A row of logits had no finite log-sum-exp. One of log-probabilities that are all -infinity does not count: whoever
// made them banned every token, and the beam cannot go on.
constexpr int32_t kBeamsNotFinite = 4;

}  // namespace arfast
