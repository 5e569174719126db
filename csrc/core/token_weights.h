// What every implementation that draws tokens computes in the same integers: random numbers, weights, the order of
// tokens, the token that a random number picks. No rounding is left to the device, so that a row draws the same token
// everywhere.
#pragma once

#include <cstdint>

#include "core/random.h"

namespace arfast {

using uint128 = unsigned __int128;

// Which tokens of a row may be drawn. Greedy decoding is top_k = 1 with top_p = 0, which leaves the first of equal
// tokens alone.
struct TokenFilters {
  float temperature;    // positive
  int64_t top_k;        // 0: off
  double top_p;         // 1: off
  uint64_t min_weight;  // of 2^40; 0: min_p is off
};

constexpr uint64_t kWeightOne = uint64_t{1} << 40;

// 2^40 e^-distance rounded down, for distance >= 0, with a relative error of at most 2e-8; 0 from 28 on, where e^-28 <
// 2^-40. 2^-f on [0, 1) is a polynomial with minimax coefficients, in units of 2^-31.
static constexpr uint64_t weight_of(float distance) {
  if (!(distance < 28)) return 0;
  // The units are 2^-26, then log2(e) 2^-30 of them, so that 2^56 of the product are one factor of 1/2.
  const uint64_t exponent = static_cast<uint64_t>(static_cast<int32_t>(distance * 67108864.0f)) * 1549082005u;
  const uint32_t f = static_cast<uint32_t>(exponent >> 24);
  const auto times_f = [f](uint32_t x) { return static_cast<uint32_t>(uint64_t{x} * f >> 32); };
  uint32_t p = 2737501u - times_f(234126u);
  p = 20571132u - times_f(p);
  p = 119165493u - times_f(p);
  p = 515877902u - times_f(p);
  p = 1488521986u - times_f(p);
  p = 2147483648u - times_f(p);
  return (uint64_t{p} << 9) >> (exponent >> 56);
}

// What orders the tokens of a row: the larger score first, then the smaller token. `order` is an integer that rises
// with the score. The 8 highest bits are how far the score lies below the best one, in steps of 1/8: a part of the
// order that spreads the tokens of a row evenly, as the bits of a float do not. 0 is smaller than every token's rank.
static constexpr uint64_t rank_of(float distance, uint32_t order, int64_t token) {
  const uint64_t step = distance < 28 ? static_cast<uint64_t>(distance * 8) : 254;
  return (255 - step) << 56 | uint64_t{order} << 24 | (0xffffff - static_cast<uint64_t>(token));
}
static constexpr uint32_t order_in_rank(uint64_t rank) { return static_cast<uint32_t>(rank >> 24); }
static constexpr int64_t token_in_rank(uint64_t rank) { return 0xffffff - static_cast<int64_t>(rank & 0xffffff); }

// The smallest rank with the same score.
static constexpr uint64_t last_tie(uint64_t rank) { return rank & ~uint64_t{0xffffff}; }

// top_p keeps the tokens with a mass before them below this: always the first, and all with top_p = 1.
static constexpr uint64_t nucleus_limit(double top_p, uint64_t mass) {
  if (top_p >= 1) return ~uint64_t{0};
  const double product = top_p * static_cast<double>(mass);
  const uint64_t down = static_cast<uint64_t>(product);
  return down + (down == 0 || static_cast<double>(down) < product);
}

// A number below `mass`, of 64 or 128 bits: 48 random bits times `mass`, rounded down.
template <typename Mass>
static constexpr Mass random_below(uint64_t bits, Mass mass) {
  const uint128 wide = mass, low = static_cast<uint64_t>(wide), high = wide >> 64;
  return static_cast<Mass>(((bits >> 16) * high << 16) + ((bits >> 16) * low >> 48));
}

}  // namespace arfast
