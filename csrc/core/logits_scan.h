// One pass over logits for the CPU implementations: log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867,
// algorithm 3) and the best tokens. Compiled once per instruction set: see core/cpu_target.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/logits_tiles.h"
#include "core/simd.h"
#include "core/top_list.h"
#include "core/transpose.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// A tile stays in the first-level cache between its maximum and its exponentials.
constexpr int kTile = kLogitsTile;
// The unit of parallel work. Sums are kept per segment and added in order, so that the bits of lse depend on neither
// the threads nor the other rows.
constexpr int64_t kSegment = 16384;

// sum over a segment or a tile of exp(x - max)
struct PartialSum {
  float max;
  float sum;
};

inline uint32_t lanes_greater(VecF a, VecF b) {
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

// e^x for x <= 16, a term of a sum; NaN for NaN, e^-87 below that. At half the cost of simd.h's exp, with a relative
// error of 2e-7 near 0 and up to 4e-6 at -87 (1e-6 with FMA), where a term hardly counts beside e^0.
#if defined(__AVX512F__)
// 2^(i / 32)
alignas(64) constexpr float kPowersOf2[32] = {
    1.0f,        1.02189715f, 1.04427378f, 1.0671404f,  1.09050773f, 1.11438674f, 1.13878863f, 1.16372486f,
    1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f,
    1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f, 1.61049033f, 1.64575548f,
    1.68179283f, 1.7186193f,  1.75625216f, 1.79470908f, 1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};

inline VecF exp_term(VecF x) {
  const VecF clamped =  // max returns its second operand when either is NaN
      reinterpret_cast<VecF>(_mm512_max_ps(_mm512_set1_ps(-87.0f), reinterpret_cast<__m512>(x)));
  // Adding 1.5 * 2^18 rounds to a multiple of 1 / 32 and leaves its fraction in the 5 low bits.
  const VecF shifted = clamped * 1.44269504f + 393216.0f;
  const VecF n = shifted - 393216.0f;
  const VecF f = clamped * 1.44269504f - n;
  const VecF power = reinterpret_cast<VecF>(_mm512_permutex2var_ps(
      _mm512_load_ps(kPowersOf2), reinterpret_cast<__m512i>(shifted), _mm512_load_ps(kPowersOf2 + 16)));
  // 2^f = 1 + f q(f) on [-1/64, 1/64]; the second factor of scalef is 2^floor(n).
  const VecF q = f * 0.240226507f + 0.693157344f;
  const VecF scaled = power * (f * q) + power;
  return reinterpret_cast<VecF>(_mm512_scalef_ps(reinterpret_cast<__m512>(scaled), reinterpret_cast<__m512>(n)));
}
#else
inline VecF exp_term(VecF x) {
  const VecF clamped = max(splat<VecF>(-87.0f), x);
  // Adding 1.5 * 2^23 + 127 rounds to the nearest integer and leaves it in the low bits as a float's biased exponent.
  const VecF shifted = clamped * 1.44269504f + 12583039.0f;
  const VecF f = clamped * 1.44269504f - (shifted - 12583039.0f);
  VecF p = splat<VecF>(1.32647273e-3f);  // 2^f = 1 + f q(f) on [-1/2, 1/2] with a minimax q
  p = p * f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  return p * reinterpret_cast<VecF>(reinterpret_cast<VecI>(shifted) << 23);
}
#endif

inline VecF load_as_float(const float* p) { return load(p); }
inline VecF load_as_float(const BFloat16* p) { return load(p); }
inline VecF load_as_float(const Float16* p) { return load(p); }
inline VecF load_as_float(const double* p) {
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
  std::fill(buffer + count, buffer + kTile, -kInfinity<float>);
  return buffer;
}

inline VecI load_flags(const bool* p) {
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
inline const float* mask_tile(const float* tile, const bool* banned, int64_t count, float* buffer) {
  if (banned == nullptr) return tile;
  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) {
    store(buffer + i, load_flags(banned + i) != 0 ? splat<VecF>(-kInfinity<float>) : load(tile + i));
  }
  for (; i < count; ++i) buffer[i] = banned[i] ? -kInfinity<float> : tile[i];
  std::fill(buffer + count, buffer + kTile, -kInfinity<float>);
  return buffer;
}

inline VecF tile_max(const float* tile) {
  VecF m0 = splat<VecF>(-kInfinity<float>), m1 = m0;
  for (int i = 0; i < kTile; i += 2 * kFloatLanes) {
    m0 = max(load(tile + i), m0);
    m1 = max(load(tile + i + kFloatLanes), m1);
  }
  return max(m0, m1);
}

// sums += exp(x - max) over a tile that has nothing above max
inline void add_exponentials(const float* tile, float max, VecF (&sums)[4]) {
  const VecF base = splat<VecF>(max == -kInfinity<float> ? 0.0f : max);
  for (int i = 0; i < kTile; i += 4 * kFloatLanes) {
    for (int j = 0; j < 4; ++j) sums[j] += exp_term(load(tile + i + j * kFloatLanes) - base);
  }
}

// The sum, given those of lanes. Where max is infinity they are NaN, as infinity - infinity is, which only a NaN among
// the logits should make it.
template <typename T>
PartialSum total_of(float max, const VecF (&sums)[4], const T* logits, int64_t count) {
  if (max < kInfinity<float>) return {max, reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]))};
  float sum = 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(to_acc(logits[i]));
    if (x != x) sum = x;
  }
  return {max, sum};
}

template <typename T>
PartialSum sum_tile(const T* logits, int64_t count) {
  alignas(64) float converted[kTile];
  const float* tile = load_tile(logits, count, converted);
  const float max = reduce_max(tile_max(tile));
  VecF sums[4] = {};
  add_exponentials(tile, max, sums);
  return total_of(max, sums, logits, count);
}

// sum_tile of as many rows as a vector has lanes, or fewer, `stride` apart. Whole tiles take one pass: their terms are
// those of the distance from the best of a row's first logits, and a row where that is of no use is summed again.
template <typename T>
void sum_tiles(const T* logits, int64_t stride, int rows, int64_t count, float* maxima, float* sums) {
  constexpr float kFarthest = 16.0f;  // what is farther away loses accuracy
  VecF row_maxima[kFloatLanes] = {}, row_sums[kFloatLanes] = {};
  float bases[kFloatLanes] = {};
  for (int r = 0; r < (count == kTile ? rows : 0); ++r) {
    const T* row = logits + r * stride;
    bases[r] = reduce_max(load_as_float(row));
    const VecF base = splat<VecF>(bases[r]);
    VecF max_of[2] = {base, base}, sum_of[4] = {};
    for (int i = 0; i < kTile; i += 4 * kFloatLanes) {
      for (int j = 0; j < 4; ++j) {
        const VecF x = load_as_float(row + i + j * kFloatLanes);
        max_of[j % 2] = max(x, max_of[j % 2]);
        sum_of[j] += exp_term(x - base);
      }
    }
    row_maxima[r] = max(max_of[0], max_of[1]);
    row_sums[r] = (sum_of[0] + sum_of[1]) + (sum_of[2] + sum_of[3]);
  }
  const VecF max_of = reduce_transposed(row_maxima, [](VecF a, VecF b) { return max(a, b); });
  const VecF above = max_of - load(bases);
  store_lanes(maxima, max_of, rows);
  store_lanes(sums, add_transposed(row_sums) * exp_term(-above), rows);
  for (int r = 0; r < rows; ++r) {
    if (count == kTile && above[r] <= kFarthest) continue;
    const PartialSum sum = sum_tile(logits + r * stride, count);
    maxima[r] = sum.max;
    sums[r] = sum.sum;
  }
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
  float max = -kInfinity<float>;
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
    add_exponentials(tile, max, sums);
  }
  return total_of(max, sums, segment.logits, segment.size);
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

// sum over a row of exp(x - max)
struct RowSum {
  float max;
  double sum;

  double lse() const { return max + std::log(sum); }
};

inline RowSum merge_sums(const PartialSum* sums, int64_t count) {
  float max = -kInfinity<float>;
  for (int64_t i = 0; i < count; ++i) max = std::max(max, sums[i].max);
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = sums[i].max == max ? 1 : std::exp(static_cast<double>(sums[i].max) - max);
    total += sums[i].sum * weight;
  }
  return {max, total};
}

}  // namespace
}  // namespace arfast::ARFAST_CPU_TARGET
