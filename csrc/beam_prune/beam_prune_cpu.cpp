// Beam pruning on the CPU: online log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3) and top-M in
// one pass over the logits, threads over fixed segments of the rows, then a merge of the K rows of each group.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "beam_prune/advance.h"
#include "beam_prune/beam_prune.h"
#include "core/logits_scan.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/tile_sums.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// What the scan leaves for the merge. A thread keeps one list along a row and stores it with the last unit (segment of
// a row) of its range; the other units of that range have an empty list.
struct Workspace {
  explicit Workspace(const BeamPruneParams& params)
      : units_per_row((params.vocab_size + kSegment - 1) / kSegment),
        list_capacity(std::min(beam_prune_list_capacity(params), params.vocab_size + 1)),
        num_units(params.num_groups * params.num_beams * units_per_row),
        sums(new PartialSum[num_units]),
        list_sizes(new int64_t[num_units]()),
        lists(new Candidate[num_units * list_capacity]) {}

  int64_t units_per_row;
  int64_t list_capacity;
  int64_t num_units;
  std::unique_ptr<PartialSum[]> sums;
  std::unique_ptr<int64_t[]> list_sizes;
  std::unique_ptr<Candidate[]> lists;
};

template <typename T>
const T* row_logits(const BeamPruneParams& params, int64_t row) {
  return static_cast<const T*>(params.logits) + row * params.logits_stride;
}

const bool* row_banned(const BeamPruneParams& params, int64_t row) {
  return params.banned != nullptr ? params.banned + row * params.banned_stride : nullptr;
}

// Bits below this have less noise than the bound, which the error of noise and scores may not make a lie: most tokens
// are dismissed before their noise is computed.
uint64_t least_bits(float score, float threshold) {
  const double bound = static_cast<double>(threshold) - score,
               error = 1e-3 + 1e-6 * (std::abs(threshold) + std::abs(score));
  const double above = -std::expm1(-std::exp(error - bound)) * 18446744073709551616.0 * 1.000001 + 2;
  return above < 18446744073709551616.0 ? 0 - static_cast<uint64_t>(above) : 0;
}

// select_from_segment for logits with noise.
template <typename T>
void draw_from_segment(const Segment<T>& segment, const GumbelNoise& noise, TopList& list) {
  for (int64_t first = 0; first < segment.size; first += kTile) {
    const float best = reduce_max(segment.maxima[first / kTile]);
    if (best == -kInfinity<float>) continue;
    const uint64_t least = least_bits(best, list.threshold());
    const bool* banned = segment.tile_banned(first);
    for (int64_t i = 0; i < segment.tile_size(first); ++i) {
      const int64_t token = segment.first_token + first + i;
      const uint64_t bits = noise.bits(token);
      if (bits < least || (banned != nullptr && banned[i])) continue;
      const float value = static_cast<float>(to_acc(segment.logits[first + i])) + gumbel_of(bits);
      if (value > list.threshold()) list.push({value, static_cast<int32_t>(token)});
    }
  }
}

template <typename T>
void scan_units(const BeamPruneParams& params, int64_t first, int64_t last, Workspace& workspace) {
  TopList list(workspace.list_capacity);
  Segment<T> segment;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t row = unit / workspace.units_per_row;
    segment.first_token = unit % workspace.units_per_row * kSegment;
    segment.size = std::min(kSegment, params.vocab_size - segment.first_token);
    segment.logits = row_logits<T>(params, row) + segment.first_token;
    segment.banned = params.banned != nullptr ? row_banned(params, row) + segment.first_token : nullptr;
    workspace.sums[unit] = sum_segment(segment);
    const GumbelNoise noise = noise_of_row(params, row);
    if (noise.exists()) {
      draw_from_segment(segment, noise, list);
    } else {
      select_from_segment(segment, list);
    }
    if (unit + 1 == last || (unit + 1) % workspace.units_per_row == 0) {
      list.cut();
      workspace.list_sizes[unit] = list.size();
      std::copy(list.begin(), list.end(), workspace.lists.get() + unit * workspace.list_capacity);
      list.clear();
    }
  }
}

// One beam of a group, at the merge.
struct Beam {
  const BeamPruneParams& params;
  int64_t group;
  float lse;
  float running;
  int64_t first_index;  // parent * V
  TopList list;         // its best tokens by logit

  float score(float logit) const { return (logit - lse) + running; }

  // Scores of NaN or -infinity are no candidates.
  void push(float logit, int64_t token, TopList& best) const {
    const float value = score(logit);
    if (!(value >= best.threshold() && value > -kInfinity<float>) || ends_too_early(params, group, token)) return;
    best.push({value, static_cast<int32_t>(first_index + token)});
  }

  // Rounding gives different logits the same score, and then the smaller token goes first: if the list's last logit
  // scores as well as the last candidate of the group, so may a smaller token that is not in the list.
  bool may_lack_ties(float last_score) const { return list.full() && score(list.threshold()) == last_score; }
};

Beam collect_beam(const BeamPruneParams& params, int64_t row, const Workspace& workspace) {
  const int64_t first_unit = row * workspace.units_per_row;
  const RowSum row_sum = merge_sums(workspace.sums.get() + first_unit, workspace.units_per_row);
  float lse = static_cast<float>(row_sum.lse());
  if (params.log_probs && std::isfinite(lse)) lse = 0;
  const int64_t first_index = row % params.num_beams * params.vocab_size;
  Beam beam{params, row / params.num_beams, lse, params.scores[row], first_index, TopList(workspace.list_capacity)};
  for (int64_t unit = first_unit; unit < first_unit + workspace.units_per_row; ++unit) {
    const Candidate* candidates = workspace.lists.get() + unit * workspace.list_capacity;
    for (int64_t i = 0; i < workspace.list_sizes[unit]; ++i) beam.list.push(candidates[i]);
  }
  beam.list.cut();
  return beam;
}

template <typename T>
void push_all_tokens(const BeamPruneParams& params, int64_t row, const Beam& beam, TopList& best) {
  const T* logits = row_logits<T>(params, row);
  const bool* banned = row_banned(params, row);
  const GumbelNoise noise = noise_of_row(params, row);
  for (int64_t token = 0; token < params.vocab_size; ++token) {
    if (banned != nullptr && banned[token]) continue;
    beam.push(noise.add_to(static_cast<float>(to_acc(logits[token])), token), token, best);
  }
}

template <typename T>
void write_group(const BeamPruneParams& params, int64_t group, const std::vector<Beam>& beams, const TopList& best) {
  for (int64_t i = 0; i < params.num_candidates; ++i) {
    const int64_t at = group * params.num_candidates + i;
    const Candidate candidate = i < best.size() ? best.begin()[i] : Candidate{-kInfinity<float>, 0};
    const int64_t parent = candidate.index / params.vocab_size, token = candidate.index % params.vocab_size;
    params.out_scores[at] = candidate.value;
    if (params.generator_state != nullptr && candidate.value > -kInfinity<float>) {  // its value has noise
      const T logit = row_logits<T>(params, group * params.num_beams + parent)[token];
      params.out_scores[at] = beams[parent].score(static_cast<float>(to_acc(logit)));
    }
    params.parents[at] = static_cast<int32_t>(parent);
    params.tokens[at] = static_cast<int32_t>(token);
  }
}

template <typename T>
void merge_group(const BeamPruneParams& params, int64_t group, const Workspace& workspace) {
  TopList best(std::min(params.num_candidates, params.num_beams * params.vocab_size));
  std::vector<Beam> beams;
  beams.reserve(params.num_beams);
  for (int64_t row = group * params.num_beams; row < (group + 1) * params.num_beams; ++row) {
    const Beam& beam = beams.emplace_back(collect_beam(params, row, workspace));
    params.lse[row] = beam.lse;
    for (const Candidate& c : beam.list) beam.push(c.value, c.index, best);
  }
  best.cut();

  const float last_score = best.full() ? best.threshold() : kInfinity<float>;
  const auto may_lack_ties = [&](const Beam& beam) { return beam.may_lack_ties(last_score); };
  if (std::any_of(beams.begin(), beams.end(), may_lack_ties)) {
    best.clear();
    for (int64_t k = 0; k < params.num_beams; ++k) {
      if (may_lack_ties(beams[k])) {
        push_all_tokens<T>(params, group * params.num_beams + k, beams[k], best);
      } else {
        for (const Candidate& c : beams[k].list) beams[k].push(c.value, c.index, best);
      }
    }
  }
  best.sort();
  write_group<T>(params, group, beams, best);
}

// merge_group without a scan: the M-th largest of the tiles' best scores is a bound from below, and the few tiles with
// a better one hold all candidates.
template <typename T>
void select_from_tiles(const BeamPruneParams& params, int64_t group) {
  const int64_t first_row = group * params.num_beams, all_rows = params.num_groups * params.num_beams;
  const TileSums tiles(params.tile_sums, params.vocab_size, all_rows, first_row, params.num_beams);
  const int64_t num_scores = params.num_beams * tiles.count;
  std::vector<Beam> beams;
  beams.reserve(params.num_beams);
  std::unique_ptr<float[]> scores(new float[num_scores]), bounds(new float[num_scores]);
  for (int64_t k = 0; k < params.num_beams; ++k) {
    const float lse = params.lse[first_row + k] = static_cast<float>(tiles.row_sum(k).lse());
    const Beam& beam =
        beams.emplace_back(Beam{params, group, lse, params.scores[first_row + k], k * params.vocab_size, TopList(1)});
    for (int64_t i = k * tiles.count; i < (k + 1) * tiles.count; ++i) {
      const float score = beam.score(tiles.maxima[i]);
      scores[i] = bounds[i] = std::isnan(score) ? -kInfinity<float> : score;
    }
  }
  TopList best(std::min(params.num_candidates, params.num_beams * params.vocab_size));
  best.raise_threshold(bounds.get(), num_scores);
  const auto for_each_better = [&](const auto& visit) {
    for (int64_t i = 0; i < num_scores; ++i) {
      if (!(scores[i] > best.threshold())) continue;
      const int64_t k = i / tiles.count, first = i % tiles.count * kTile;
      visit(beams[k], row_logits<T>(params, first_row + k) + first, first,
            std::min<int64_t>(kTile, params.vocab_size - first));
    }
  };
  for_each_better([](const Beam&, const T* logits, int64_t, int64_t count) { prefetch_tile(logits, count); });
  for_each_better([&](const Beam& beam, const T* logits, int64_t first, int64_t count) {
    const auto score = [&](VecF x) { return (x - splat<VecF>(beam.lse)) + splat<VecF>(beam.running); };
    push_tile(logits, count, beam.first_index + first, score, best);
  });
  best.sort();
  write_group<T>(params, group, beams, best);
}

// The one thread of a team, which waits for nobody.
struct Alone {
  static constexpr int64_t index() { return 0; }
  static constexpr int64_t count() { return 1; }
  static void sync() {}
};

void beam_step_from_tiles(const BeamPruneParams& params) {
  const int64_t grain =
      grain_for(params.num_beams * num_logits_tiles(params.vocab_size) + params.num_candidates * kTile);
  dispatch_dtype(params.dtype, [&](auto tag) {
    parallel_for(params.num_groups, grain, [&](int64_t first, int64_t last) {
      AdvanceScratch scratch;
      for (int64_t group = first; group < last; ++group) {
        select_from_tiles<typename decltype(tag)::type>(params, group);
        Advance(params, group, scratch, Alone{}).run();
      }
    });
  });
}

}  // namespace

void beam_prune(const BeamPruneParams& params) {
  if (params.tile_sums != nullptr) return beam_step_from_tiles(params);
  Workspace workspace(params);
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(workspace.num_units, grain_for(kSegment),
                 [&](int64_t first, int64_t last) { scan_units<T>(params, first, last, workspace); });
    const int64_t grain = grain_for(params.num_beams * workspace.list_capacity);
    parallel_for(params.num_groups, grain, [&](int64_t first, int64_t last) {
      AdvanceScratch scratch;
      for (int64_t group = first; group < last; ++group) {
        merge_group<T>(params, group, workspace);
        if (params.state.lengths != nullptr) Advance(params, group, scratch, Alone{}).run();
      }
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
