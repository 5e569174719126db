// Random bits as a function of a counter, the same on every device.
#pragma once

#include <cstdint>

namespace arfast {

// One step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) from `state`.
static constexpr uint64_t mix(uint64_t state) {
  state += 0x9e3779b97f4a7c15u;
  state = (state ^ state >> 30) * 0xbf58476d1ce4e5b9u;
  state = (state ^ state >> 27) * 0x94d049bb133111ebu;
  return state ^ state >> 31;
}

// 64 random bits, a pure function of a row's state (seed, sample, step); `later` counts on from its step.
static constexpr uint64_t random_bits(const int64_t* state, int64_t stride, int64_t later = 0) {
  const uint64_t seed = static_cast<uint64_t>(state[0]), sample = static_cast<uint64_t>(state[stride]),
                 step = static_cast<uint64_t>(state[2 * stride]);
  return mix(mix(mix(seed) + sample) + step + static_cast<uint64_t>(later));
}

static constexpr void advance_state(int64_t* state, int64_t stride, int64_t steps) {
  int64_t& step = state[2 * stride];
  step = static_cast<int64_t>(static_cast<uint64_t>(step) + static_cast<uint64_t>(steps));
}

}  // namespace arfast
