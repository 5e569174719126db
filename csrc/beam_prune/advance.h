// The update of a beam search's state by the candidates of one step, with the rules of transformers' beam search: once
// for the CPU and for the GPU, on which the threads of a block share the loops.
#pragma once

#include <cmath>

#include "beam_prune/beam_prune.h"

#if defined(__CUDACC__)
#define ARFAST_DEVICE __device__
#else
#define ARFAST_DEVICE
#endif

namespace arfast {
namespace {

// What one group needs until its step is done, in shared memory on a GPU.
struct AdvanceScratch {
  static constexpr int64_t kSlots = 1024;
  int32_t ends[kMaxStateCandidates];  // 0 or 1
  int32_t chosen[kMaxStateBeams];     // candidates
  float running[kMaxStateBeams];
  float scores[kMaxStateBeams];
  int32_t endings[kMaxStateBeams * 3];
  float ending_log_probs[kMaxStateBeams];
  int32_t slots[kSlots];
};

// A Team runs the same code in `count` threads, of which this is `index`; sync() waits for all of them.
template <typename Team>
class Advance {
 public:
  ARFAST_DEVICE Advance(const BeamPruneParams& params, int64_t group, AdvanceScratch& scratch, const Team& team)
      : params_(params),
        state_(params.state),
        scratch_(scratch),
        team_(team),
        group_(group),
        beams_(state_.num_beams),
        step_(state_.lengths[group]),
        scores_(params.out_scores + group * params.num_candidates),
        parents_(params.parents + group * params.num_candidates),
        tokens_(params.tokens + group * params.num_candidates) {}

  ARFAST_DEVICE void run() {
    if (step_ < 0 || step_ >= state_.max_length) return;  // one step too many harms nothing
    find_ends();
    team_.sync();
    choose_beams();
    merge_finished();
    team_.sync();
    append_beams();
    write_finished();
    team_.sync();
    write_running();
    move_slots();
    if (params_.generator_state != nullptr && team_.index() == 0) ++params_.generator_state[group_ * 3 + 2];
  }

 private:
  template <typename F>
  ARFAST_DEVICE void for_each(int64_t count, const F& f) const {
    for (int64_t i = team_.index(); i < count; i += team_.count()) f(i);
  }

  ARFAST_DEVICE bool exists(int64_t candidate) const { return scores_[candidate] > -INFINITY; }
  ARFAST_DEVICE float log_prob(int64_t candidate) const {
    return scores_[candidate] - params_.scores[group_ * params_.num_beams + parents_[candidate]];
  }
  ARFAST_DEVICE int64_t length() const { return step_ + 1; }
  ARFAST_DEVICE int64_t beam_at(int64_t k) const { return group_ * beams_ + k; }
  ARFAST_DEVICE int64_t at_step(int64_t k) const { return (step_ * params_.num_groups + group_) * beams_ + k; }

  ARFAST_DEVICE void find_ends() {
    for_each(params_.num_candidates, [&](int64_t i) {
      bool end = length() == state_.max_length;
      for (int64_t j = 0; j < state_.num_ends; ++j) end |= state_.ends[j] == tokens_[i];
      scratch_.ends[i] = end && exists(i);
    });
  }

  // The K best of those that go on, and ending ones fill up. Candidates are in the order of their scores unless they
  // were drawn.
  ARFAST_DEVICE void choose_beams() {
    const bool drawn = params_.generator_state != nullptr;
    for_each(params_.num_candidates, [&](int64_t i) {
      const int32_t* ends = scratch_.ends;
      int64_t rank = 0;
      for (int64_t j = 0; j < (ends[i] || drawn ? params_.num_candidates : i) && rank < beams_; ++j) {
        const bool better = scores_[j] > scores_[i] || (scores_[j] == scores_[i] && j < i);
        rank += ends[j] != ends[i] ? !ends[j] : better;
      }
      if (rank < beams_) scratch_.chosen[rank] = static_cast<int32_t>(i);
    });
  }

  ARFAST_DEVICE bool all_finished(const int32_t* endings) const {
    for (int64_t k = 0; k < beams_; ++k) {
      if (endings[k * 3] < 0) return false;
    }
    return true;
  }

  // The K best of the finished hypotheses and of those among the K best candidates that end; of equals the older first.
  ARFAST_DEVICE void merge_finished() {
    const float* finished = state_.scores + beam_at(0);
    const int32_t* endings = state_.endings + beam_at(0) * 3;
    const bool closed = state_.early_stopping == EarlyStopping::kTrue && all_finished(endings);
    const bool accepts = state_.improvable[group_] && !closed;
    const auto score = [&](int64_t i) {
      if (i < beams_) return finished[i];
      if (!accepts || !scratch_.ends[i - beams_]) return -INFINITY;
      return scores_[i - beams_] / state_.length_powers[length()];
    };
    for_each(2 * beams_, [&](int64_t i) {
      const float mine = score(i);
      int64_t rank = 0;
      for (int64_t j = 0; j < 2 * beams_ && rank < beams_; ++j) {
        const float other = score(j);
        rank += other > mine || (other == mine && j < i);
      }
      if (rank >= beams_) return;
      const int64_t candidate = i - beams_;
      int32_t* ending = scratch_.endings + rank * 3;
      scratch_.scores[rank] = mine;
      ending[0] = candidate < 0 ? endings[i * 3] : static_cast<int32_t>(step_);
      ending[1] = candidate < 0 ? endings[i * 3 + 1] : parents_[candidate];
      ending[2] = candidate < 0 ? endings[i * 3 + 2] : tokens_[candidate];
      scratch_.ending_log_probs[rank] = candidate < 0 ? state_.ending_log_probs[beam_at(i)] : log_prob(candidate);
    });
  }

  ARFAST_DEVICE void append_beams() {
    for_each(beams_, [&](int64_t k) {
      const int64_t candidate = scratch_.chosen[k], parent = parents_[candidate];
      scratch_.running[k] = scratch_.ends[candidate] ? -INFINITY : scores_[candidate];  // what ended goes nowhere
      state_.parents[at_step(k)] = static_cast<int32_t>(parent);
      state_.tokens[at_step(k)] = tokens_[candidate];
      state_.log_probs[at_step(k)] = log_prob(candidate);
      state_.next_tokens[beam_at(k)] = tokens_[candidate];
      state_.rows[beam_at(k)] = group_ * params_.num_beams + parent;
    });
  }

  ARFAST_DEVICE void write_finished() {
    for_each(beams_, [&](int64_t k) {
      state_.scores[beam_at(k)] = scratch_.scores[k];
      state_.ending_log_probs[beam_at(k)] = scratch_.ending_log_probs[k];
      for (int64_t j = 0; j < 3; ++j) state_.endings[beam_at(k) * 3 + j] = scratch_.endings[k * 3 + j];
    });
  }

  // The running scores, which the log-probabilities needed as they were, and what the group thinks of its future: it
  // gives up for good when its best beam would not beat its worst hypothesis.
  ARFAST_DEVICE void write_running() {
    for_each(beams_, [&](int64_t k) { state_.running[beam_at(k)] = scratch_.running[k]; });
    if (team_.index() != 0) return;
    const float power = state_.length_powers[state_.longest_counts ? state_.max_length : length()];
    const bool full = all_finished(scratch_.endings);
    const bool beats = scratch_.running[0] / power > scratch_.scores[beams_ - 1];
    const bool improvable = state_.improvable[group_] && (!full || beats);
    const bool closed = state_.early_stopping == EarlyStopping::kTrue && full;
    int32_t status = improvable && !closed ? kBeamsCanChange : 0;
    for (int64_t i = 0; i < params_.num_candidates; ++i) {
      if (exists(i) && !scratch_.ends[i]) status |= kBeamsGoOn;
    }
    for (int64_t k = 0; k < params_.num_beams; ++k) {
      const float lse = params_.lse[group_ * params_.num_beams + k];
      const bool usable = params_.log_probs ? lse < INFINITY : fabsf(lse) < INFINITY;
      if (!usable) status |= kBeamsNotFinite;
    }
    state_.improvable[group_] = improvable;
    state_.status[group_] = status;
    state_.lengths[group_] = static_cast<int32_t>(length());
  }

  // A beam takes over where its parent's generated tokens are; its own next token goes to its own slot.
  ARFAST_DEVICE void move_slots() {
    if (state_.slots == nullptr || state_.prompt_lengths[group_] < 0) return;
    const int64_t stride = state_.cache_length, width = AdvanceScratch::kSlots / beams_;
    const int64_t first = state_.prompt_lengths[group_], next = first + step_;
    const int64_t end = next < stride ? next : stride;
    int32_t* slots = state_.slots + beam_at(0) * stride;
    for (int64_t begin = first; begin < end; begin += width) {
      const int64_t columns = end - begin < width ? end - begin : width;
      for_each(columns * beams_, [&](int64_t i) {
        scratch_.slots[i] = slots[parents_[scratch_.chosen[i / columns]] * stride + begin + i % columns];
      });
      team_.sync();
      for_each(columns * beams_,
               [&](int64_t i) { slots[i / columns * stride + begin + i % columns] = scratch_.slots[i]; });
      team_.sync();
    }
    if (next >= stride) return;
    for_each(beams_, [&](int64_t k) {
      const int64_t beam = beam_at(k);
      slots[k * stride + next] = state_.own_slots != nullptr ? state_.own_slots[beam] : static_cast<int32_t>(beam);
    });
  }

  const BeamPruneParams& params_;
  const BeamState& state_;
  AdvanceScratch& scratch_;
  const Team& team_;
  const int64_t group_, beams_, step_;
  const float* scores_;     // [M], of the candidates
  const int32_t* parents_;  // [M]
  const int32_t* tokens_;   // [M]
};

}  // namespace
}  // namespace arfast
