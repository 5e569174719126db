// Beam pruning on the CPU: online log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3) and top-M in
// one pass over the logits, threads over fixed segments of the rows, then a merge of the K rows of each group.
#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "beam_prune/advance.h"
#include "beam_prune/beam_prune.h"
#include "beam_prune/top_list.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// A tile stays in the first-level cache between its maximum and its exponentials.
constexpr int kTile = 256;
// The unit of parallel work. Sums are kept per segment and added in order, so that the bits of lse depend on neither
// the threads nor the other rows.
constexpr int64_t kSegment = 16384;

// sum over a segment of exp(x - max)
struct PartialSum {
  float max;
  float sum;
};

uint32_t lanes_greater(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), _CMP_GT_OQ));
#else
  uint32_t lanes = 0;
  for (int lane = 0; lane < kFloatLanes; ++lane) lanes |= uint32_t{a[lane] > b[lane]} << lane;
  return lanes;
#endif
}

// e^x for x <= 0, NaN for NaN, at half the cost of simd.h's exp: 2^f = 1 + f q(f) on [-1/2, 1/2] with a minimax q. The
// relative error rises from 2e-7 at 0 to 4e-6 at -87 (1e-6 with FMA), where e^x hardly counts in a sum that holds e^0;
// below, the result stays at e^-87.
VecF exp_nonpositive(VecF x) {
  const VecF clamped = max(splat<VecF>(-87.0f), x);
  // Adding 1.5 * 2^23 + 127 rounds to the nearest integer and leaves it in the low bits as a float's biased exponent.
  const VecF shifted = clamped * 1.44269504f + 12583039.0f;
  const VecF f = clamped * 1.44269504f - (shifted - 12583039.0f);
  VecF p = splat<VecF>(1.32647273e-3f);
  p = p * f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  return p * reinterpret_cast<VecF>(reinterpret_cast<VecI>(shifted) << 23);
}

VecF load_as_float(const float* p) { return load(p); }
VecF load_as_float(const BFloat16* p) { return load(p); }
VecF load_as_float(const Float16* p) { return load(p); }
VecF load_as_float(const double* p) {
  VecF v{};
  for (int lane = 0; lane < kFloatLanes; ++lane) v[lane] = static_cast<float>(p[lane]);
  return v;
}

// kTile logits as floats: in place, or converted and filled up with -infinity in `buffer`.
template <typename T>
const float* load_tile(const T* logits, int64_t count, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == kTile) return logits;
  }
  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) store(buffer + i, load_as_float(logits + i));
  for (; i < count; ++i) buffer[i] = static_cast<float>(to_acc(logits[i]));
  std::fill(buffer + count, buffer + kTile, -kInfinity);
  return buffer;
}

VecI load_flags(const bool* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecI>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<VecI>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  VecI flags{};
  for (int lane = 0; lane < kFloatLanes; ++lane) flags[lane] = p[lane];
  return flags;
#endif
}

// The same with -infinity for banned tokens.
const float* mask_tile(const float* tile, const bool* banned, int64_t count, float* buffer) {
  if (banned == nullptr) return tile;
  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) {
    store(buffer + i, load_flags(banned + i) != 0 ? splat<VecF>(-kInfinity) : load(tile + i));
  }
  for (; i < count; ++i) buffer[i] = banned[i] ? -kInfinity : tile[i];
  std::fill(buffer + count, buffer + kTile, -kInfinity);
  return buffer;
}

VecF tile_max(const float* tile) {
  VecF m0 = splat<VecF>(-kInfinity), m1 = m0;
  for (int i = 0; i < kTile; i += 2 * kFloatLanes) {
    m0 = max(load(tile + i), m0);
    m1 = max(load(tile + i + kFloatLanes), m1);
  }
  return max(m0, m1);
}

// One segment of one row.
template <typename T>
struct Segment {
  const T* logits;
  const bool* banned;  // or nullptr
  int64_t first_token;
  int64_t size;
  VecF maxima[kSegment / kTile];  // per tile and lane, of the tokens that are not banned

  int64_t tile_size(int64_t first) const { return std::min<int64_t>(kTile, size - first); }
  const bool* tile_banned(int64_t first) const { return banned != nullptr ? banned + first : nullptr; }
};

// Log-sum-exp of the segment; fills its maxima.
template <typename T>
PartialSum sum_segment(Segment<T>& segment) {
  alignas(64) float converted[kTile], allowed[kTile];
  float max = -kInfinity;
  VecF sums[4] = {};
  for (int64_t first = 0; first < segment.size; first += kTile) {
    const int64_t count = segment.tile_size(first);
    const float* tile = load_tile(segment.logits + first, count, converted);
    const VecF maxima = tile_max(tile);
    if (lanes_greater(maxima, splat<VecF>(max)) != 0) {
      const float new_max = reduce_max(maxima);
      for (VecF& sum : sums) sum *= std::exp(max - new_max);
      max = new_max;
    }
    const float* candidates = mask_tile(tile, segment.tile_banned(first), count, allowed);
    segment.maxima[first / kTile] = candidates == tile ? maxima : tile_max(candidates);
    const VecF base = splat<VecF>(max == -kInfinity ? 0.0f : max);
    for (int i = 0; i < kTile; i += 4 * kFloatLanes) {
      for (int j = 0; j < 4; ++j) sums[j] += exp_nonpositive(load(tile + i + j * kFloatLanes) - base);
    }
  }
  float sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (max == kInfinity) {  // infinity - infinity has made the sum NaN, which only a NaN among the logits should
    sum = 1.0f;
    for (int64_t i = 0; i < segment.size; ++i) {
      const float x = static_cast<float>(to_acc(segment.logits[i]));
      if (x != x) sum = x;
    }
  }
  return {max, sum};
}

// Pushes the segment's candidates above the threshold. Tokens ascend, so an equal one comes too late.
template <typename T>
void select_from_segment(const Segment<T>& segment, TopList& list) {
  alignas(64) float converted[kTile], allowed[kTile];
  const int64_t num_tiles = (segment.size + kTile - 1) / kTile;
  int64_t num_passing = 0;
  for (int64_t t = 0; t < num_tiles; ++t) {
    num_passing += lanes_greater(segment.maxima[t], splat<VecF>(list.threshold())) != 0;
  }
  if (num_passing == num_tiles) {
    float maxima[kSegment / kTile * kFloatLanes];
    std::memcpy(maxima, segment.maxima, num_tiles * sizeof(VecF));
    list.raise_threshold(maxima, num_tiles * kFloatLanes);
  }
  for (int64_t t = 0; t < num_tiles; ++t) {
    const VecF threshold = splat<VecF>(list.threshold());
    if (lanes_greater(segment.maxima[t], threshold) == 0) continue;
    const int64_t first = t * kTile, count = segment.tile_size(first);
    const float* tile = load_tile(segment.logits + first, count, converted);
    tile = mask_tile(tile, segment.tile_banned(first), count, allowed);
    for (int i = 0; i < kTile; i += kFloatLanes) {
      uint32_t lanes = lanes_greater(load(tile + i), threshold);
      for (; lanes != 0; lanes &= lanes - 1) {
        const int offset = i + __builtin_ctz(lanes);
        list.push({tile[offset], static_cast<int32_t>(segment.first_token + first + offset)});
      }
    }
  }
}

// What the scan leaves for the merge. A thread keeps one list along a row and stores it with the last unit (segment of
// a row) of its range; the other units of that range have an empty list.
struct Workspace {
  explicit Workspace(const BeamPruneParams& params)
      : units_per_row((params.vocab_size + kSegment - 1) / kSegment),
        // One more than asked for tells whether the tokens left out could tie with the last one.
        list_capacity(std::min(params.num_candidates, params.vocab_size) + 1),
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
    select_from_segment(segment, list);
    if (unit + 1 == last || (unit + 1) % workspace.units_per_row == 0) {
      list.cut();
      workspace.list_sizes[unit] = list.size();
      std::copy(list.begin(), list.end(), workspace.lists.get() + unit * workspace.list_capacity);
      list.clear();
    }
  }
}

float row_lse(const PartialSum* sums, int64_t count) {
  float max = -kInfinity;
  for (int64_t i = 0; i < count; ++i) max = std::max(max, sums[i].max);
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = sums[i].max == max ? 1 : std::exp(static_cast<double>(sums[i].max) - max);
    total += sums[i].sum * weight;
  }
  return static_cast<float>(max + std::log(total));
}

// One beam of a group, at the merge.
struct Beam {
  float lse;
  float running;
  int64_t first_index;  // parent * V
  TopList list;         // its best tokens by logit

  float score(float logit) const { return (logit - lse) + running; }

  // Scores of NaN or -infinity are no candidates.
  void push(float logit, int64_t token, TopList& best) const {
    const float value = score(logit);
    if (value >= best.threshold() && value > -kInfinity) best.push({value, static_cast<int32_t>(first_index + token)});
  }

  // Rounding gives different logits the same score, and then the smaller token goes first: if the list's last logit
  // scores as well as the last candidate of the group, so may a smaller token that is not in the list.
  bool may_lack_ties(float last_score) const { return list.full() && score(list.threshold()) == last_score; }
};

Beam collect_beam(const BeamPruneParams& params, int64_t row, const Workspace& workspace) {
  const int64_t first_unit = row * workspace.units_per_row;
  Beam beam{row_lse(workspace.sums.get() + first_unit, workspace.units_per_row), params.scores[row],
            row % params.num_beams * params.vocab_size, TopList(workspace.list_capacity)};
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
  for (int64_t token = 0; token < params.vocab_size; ++token) {
    if (banned != nullptr && banned[token]) continue;
    beam.push(static_cast<float>(to_acc(logits[token])), token, best);
  }
}

void write_group(const BeamPruneParams& params, int64_t group, const TopList& best) {
  for (int64_t i = 0; i < params.num_candidates; ++i) {
    const int64_t at = group * params.num_candidates + i;
    const Candidate candidate = i < best.size() ? best.begin()[i] : Candidate{-kInfinity, 0};
    params.out_scores[at] = candidate.value;
    params.parents[at] = static_cast<int32_t>(candidate.index / params.vocab_size);
    params.tokens[at] = static_cast<int32_t>(candidate.index % params.vocab_size);
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

  const float last_score = best.full() ? best.threshold() : kInfinity;
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
  write_group(params, group, best);
}

// The one thread of a team, which waits for nobody.
struct Alone {
  static constexpr int64_t index() { return 0; }
  static constexpr int64_t count() { return 1; }
  static void sync() {}
};

}  // namespace

void beam_prune(const BeamPruneParams& params) {
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
        if (params.state.lengths != nullptr) advance_group(params, group, scratch, Alone{});
      }
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
