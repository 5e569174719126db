// Acceptance and residual of speculative sampling (Leviathan, Kalman and Matias 2023, arXiv 2211.17192, algorithm 1;
// Chen et al. 2023, arXiv 2302.01318, algorithm 2) in exact integers. With p = weight / mass of a token in the target's
// row and q the same in the draft's, everything is multiplied by both masses: a weight is at most 2^40 and V < 2^24, so
// a mass is below 2^64, a product below 2^104, and the residuals of a row sum up to at most the product of the masses.
#pragma once

#include <cstdint>

#include "core/token_weights.h"

namespace arfast {

// Of a token in the distribution of a row.
struct Share {
  uint64_t weight;
  uint64_t mass;
};

// With probability min(1, p / q). Certain when p >= q > 0, since the random number is below q. A token that the draft
// cannot have drawn (q = 0) is accepted when the target may draw it.
static constexpr bool accepts(uint64_t bits, Share target, Share draft) {
  const uint128 p = uint128{target.weight} * draft.mass, q = uint128{draft.weight} * target.mass;
  return random_below(bits, q) < p;
}

// max(0, p - q). After a rejection p < q for the token, hence p > q for another one, as both sum up to the product of
// the masses: the residuals of a row are all 0 only when the token was in neither distribution.
static constexpr uint128 residual(Share target, Share draft) {
  const uint128 p = uint128{target.weight} * draft.mass, q = uint128{draft.weight} * target.mass;
  return p > q ? p - q : 0;
}

// Other random bits than those that draw the same token: `random` are the latter.
static constexpr uint64_t acceptance_bits(uint64_t random) { return mix(random + 1); }

}  // namespace arfast
