// The sequences of a beam search on the CPU: each walks its own back-pointers.
#include "beam_hypotheses/beam_hypotheses.h"
#include "core/parallel.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

void write_hypothesis(const BeamHypothesesParams& params, int64_t index) {
  const int64_t group = index / params.num_hypotheses, rank = index % params.num_hypotheses;
  const HypothesisEnding ending(params, group, rank);
  int64_t* tokens = params.hypotheses + index * params.max_length;
  float* log_probs = params.hypotheses_log_probs + index * params.max_length;
  params.lengths[index] = static_cast<int32_t>(ending.last + 1);
  for (int64_t step = ending.last + 1; step < params.max_length; ++step) {
    tokens[step] = params.pad_token;
    log_probs[step] = 0;
  }
  if (ending.last < 0) return;
  tokens[ending.last] = ending.token;
  log_probs[ending.last] = params.ending_log_probs[ending.index];
  int64_t beam = ending.beam;
  for (int64_t step = ending.last - 1; step >= 0; --step) {
    const int64_t at = (step * params.num_groups + group) * params.num_beams + beam;
    tokens[step] = params.tokens[at];
    log_probs[step] = params.log_probs[at];
    beam = HypothesisEnding::clamp_beam(params, params.parents[at]);
  }
}

}  // namespace

void beam_hypotheses(const BeamHypothesesParams& params) {
  parallel_for(params.num_groups * params.num_hypotheses, grain_for(params.max_length),
               [&](int64_t begin, int64_t end) {
                 for (int64_t index = begin; index < end; ++index) write_hypothesis(params, index);
               });
}

}  // namespace arfast::ARFAST_CPU_TARGET
