// Contract of beam_hypotheses: the back-pointers of a beam search, and the sequences that end in them.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/cuda_function.h"

namespace arfast {

constexpr int64_t kMaxHypothesesBeams = 256;

struct BeamHypothesesParams {
  int64_t num_groups;             // B
  int64_t num_beams;              // K
  int64_t max_length;             // L
  int64_t num_hypotheses;         // n, the first of each group's K
  int64_t pad_token;              // what follows the last token
  const int32_t* parents;         // [L, B, K], the beam that a beam continues
  const int32_t* tokens;          // [L, B, K]
  const float* log_probs;         // [L, B, K], of the tokens
  const int32_t* endings;         // [B, K, 3]: (the last step or -1 for none, the beam it continues, the token)
  const float* ending_log_probs;  // [B, K]
  int64_t* hypotheses;            // [B * n, L], dense
  float* hypotheses_log_probs;    // [B * n, L], dense: 0 after the last token
  int32_t* lengths;               // [B * n]
};

// Where a hypothesis ended. What the state says is clamped: nothing outside it is read.
struct HypothesisEnding {
  int64_t last, beam, token, index;

  constexpr HypothesisEnding(const BeamHypothesesParams& params, int64_t group, int64_t rank)
      : last(params.endings[(group * params.num_beams + rank) * 3]),
        beam(params.endings[(group * params.num_beams + rank) * 3 + 1]),
        token(params.endings[(group * params.num_beams + rank) * 3 + 2]),
        index(group * params.num_beams + rank) {
    if (last < -1) last = -1;
    if (last >= params.max_length) last = params.max_length - 1;
    beam = clamp_beam(params, beam);
  }
  static constexpr int64_t clamp_beam(const BeamHypothesesParams& params, int64_t beam) {
    return beam < 0 ? 0 : beam < params.num_beams ? beam : params.num_beams - 1;
  }
};

ARFAST_CPU_FUNCTION(beam_hypotheses, BeamHypothesesParams)
ARFAST_CUDA_FUNCTION(beam_hypotheses, BeamHypothesesParams)

}  // namespace arfast
