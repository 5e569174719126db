// Contract of beam_prune: sizes, strides (in elements) and pointers shared by the binding and the implementations.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/dtype.h"

namespace arfast {

struct BeamPruneParams {
  DType dtype;             // of logits
  int64_t num_groups;      // B
  int64_t num_beams;       // K
  int64_t vocab_size;      // V; K * V fits an int32
  int64_t num_candidates;  // M
  const void* logits;      // [B * K, V]
  const float* scores;     // [B, K], dense: what each beam has so far
  const bool* banned;      // [B * K, V] or nullptr: true keeps a token out of the selection, not out of lse
  int64_t logits_stride;
  int64_t banned_stride;
  float* out_scores;  // [B, M], dense, descending
  int32_t* parents;   // [B, M], dense
  int32_t* tokens;    // [B, M], dense
  float* lse;         // [B, K], dense
};

ARFAST_CPU_FUNCTION(beam_prune, BeamPruneParams)

}  // namespace arfast
