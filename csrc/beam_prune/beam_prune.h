// Contract of beam_prune and beam_step: sizes, strides (in elements) and pointers shared by the binding and the
// implementations.
#pragma once

#include <cstdint>

#include "beam_prune/beam_state.h"
#include "core/cpu_target.h"
#include "core/cuda_function.h"
#include "core/dtype.h"
#include "core/gumbel.h"
#include "core/logits_tiles.h"

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
  int64_t banned_stride;     // 0: the same for all rows
  bool log_probs;            // whether the logits are log-probabilities, and a finite lse counts as 0
  float* out_scores;         // [B, M], dense, descending
  int32_t* parents;          // [B, M], dense
  int32_t* tokens;           // [B, M], dense
  float* lse;                // [B, K], dense
  int64_t* generator_state;  // [B, 3], dense, or nullptr: candidates are drawn without replacement, in this order
  // [2, tiles, B * K], dense, or nullptr: see core/logits_tiles.h. On the CPU, without bans, noise and log_probs.
  const float* tile_sums;
  // Of the CUDA implementation: a row is scanned in num_parts parts of part_vectors 16-byte vectors.
  int64_t num_parts;
  int64_t part_vectors;
  void* workspace;        // beam_prune_workspace_bytes(...)
  uint32_t* num_arrived;  // [B], 0
  // Of beam_step, whose M candidates make a step of it; without lengths there is none. Its `running` may be `scores`.
  BeamState state;
};

// What a thread holds in registers of float32 logits; of 16-bit ones half as much, the same number of elements.
constexpr int64_t kBeamPruneHeldBytes = 128;

// The smallest parts that give at most about as many blocks as a GPU holds at once; no more than the registers of 256
// threads take. From the sizes alone, so that the bits of lse are the same on every GPU.
inline void choose_beam_prune_parts(int64_t element_size, BeamPruneParams& params) {
  const int64_t vectors = params.vocab_size / (16 / element_size) + 2;  // a row may begin and end within a vector
  const int64_t largest = 256 * (kBeamPruneHeldBytes / 16) * element_size / 4;
  for (params.part_vectors = 256; params.part_vectors < largest; params.part_vectors *= 2) {
    if (params.num_groups * params.num_beams * ((vectors - 1) / params.part_vectors + 1) <= 512) break;
  }
  params.num_parts = (vectors - 1) / params.part_vectors + 1;
}

// How many of its best tokens the scan keeps. One more than asked for tells whether tokens left out could tie with the
// last one; those that must not end a hypothesis yet are sorted out at the merge.
static constexpr int64_t beam_prune_list_capacity(const BeamPruneParams& params) {
  return params.num_candidates + 1 + (params.state.min_length > 0 ? params.state.num_ends : 0);
}

// The best tokens of every part as 8-byte keys, then its sum as two floats.
static constexpr int64_t beam_prune_workspace_bytes(const BeamPruneParams& params) {
  return params.num_groups * params.num_beams * params.num_parts * (beam_prune_list_capacity(params) + 1) * 8;
}

// What is added to the logits of a row for the order of the candidates, not to their scores.
static constexpr GumbelNoise noise_of_row(const BeamPruneParams& params, int64_t row) {
  const int64_t group = row / params.num_beams, first = row % params.num_beams * params.vocab_size;
  return {params.generator_state != nullptr ? params.generator_state + group * 3 : nullptr, first};
}

// Whether a token would end a hypothesis that is too short for it.
static constexpr bool ends_too_early(const BeamPruneParams& params, int64_t group, int64_t token) {
  const BeamState& state = params.state;
  if (state.min_length == 0 || state.lengths[group] >= state.min_length) return false;
  for (int64_t i = 0; i < state.num_ends; ++i) {
    if (state.ends[i] == token) return true;
  }
  return false;
}

ARFAST_CPU_FUNCTION(beam_prune, BeamPruneParams)
ARFAST_CUDA_FUNCTION(beam_prune, BeamPruneParams)

}  // namespace arfast
