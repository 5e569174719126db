// What a decode step can leave of its logits while they are in the cache, for a beam step to read instead of them: of
// every tile of a row the maximum and the sum of exp(x - maximum), those of a tile side by side: threads that are at
// work on neighbouring tiles then write to different cache lines.
#pragma once

#include <cstdint>

namespace arfast {

constexpr int kLogitsTile = 256;

static constexpr int64_t num_logits_tiles(int64_t vocab_size) { return (vocab_size + kLogitsTile - 1) / kLogitsTile; }

}  // namespace arfast
