// Noise from the standard Gumbel distribution, -ln(-ln(u)), in integers: the same bits on every device. What is left
// to floats rounds an integer once. The larger score + noise of two tokens is a draw from the softmax of their scores,
// and the k largest of many are a draw of k without replacement (Kool et al. 2019, arXiv 1903.06059, section 2.3).
#pragma once

#include <cstdint>

#include "core/random.h"

namespace arfast {

// Of a number that is not 0.
static constexpr int leading_zeros(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return __clzll(static_cast<long long>(x));
#else
  return __builtin_clzll(x);
#endif
}

// The noise of u = bits / 2^64, with an error of 3e-7 before it is rounded. -log2(u) = n + p: n leading zeros, and with
// the rest as a number 2 - h in [1, 2), p = -log2(1 - h / 2). Small ones, which are the largest noise, are h times a
// polynomial with minimax coefficients in units of 2^-30, so that their relative error is no larger; then log2(1 + f)
// likewise.
static constexpr float gumbel_of(uint64_t bits) {
  const auto times = [](uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); };
  bits |= 1;
  const int zeros = leading_zeros(bits);
  const uint64_t rest = ~(bits << zeros) + 1;  // h in units of 2^-63, at most 2^63
  const uint32_t h = static_cast<uint32_t>((rest - 1) >> 31);
  uint32_t q = 13088702u - times(h, 7170050u);
  q = 19010456u - times(h, q);
  q = 1840705u + times(h, q);
  q = 26358548u + times(h, q);
  q = 64260319u + times(h, q);
  q = 193649402u + times(h, q);
  q = 774540888u + times(h, q);
  const int small = leading_zeros(rest);
  uint64_t value = (rest << small >> 32) * q;  // p in units of 2^(-61 - small)
  int unit = -61 - small;
  if (zeros > 0) {
    value = (static_cast<uint64_t>(zeros) << 56) + (value >> (small < 58 ? small + 5 : 63));
    unit = -56;
  }
  const int top = leading_zeros(value);
  const uint32_t f = static_cast<uint32_t>(value << top << 1 >> 32);
  q = 68297834u - times(f, 13227757u);
  q = 166806946u - times(f, q);
  q = 274887753u - times(f, q);
  q = 379454599u - times(f, q);
  q = 515464434u - times(f, q);
  q = 774500808u - times(f, q);
  q = 1549081704u - times(f, q);
  // -ln(2) (log2(-log2(u)) + log2(ln(2))), all in units of 2^-24
  const int64_t log2 = static_cast<int64_t>(63 - top + unit) * 16777216 + (times(f, q) >> 6);
  return static_cast<float>(static_cast<int32_t>((8871228 - log2) * 744261118 >> 30)) * 5.9604644775390625e-8f;
}

// The noise of the candidates of a row of a generator's state (seed, sample, step), from one of them on: a function of
// these and the candidate's number.
class GumbelNoise {
 public:
  // Without a state there is no noise.
  constexpr GumbelNoise(const int64_t* state, int64_t first)
      : exists_(state != nullptr), stream_(exists_ ? random_bits(state, 1) + static_cast<uint64_t>(first) : 0) {}

  constexpr bool exists() const { return exists_; }
  constexpr uint64_t bits(int64_t candidate) const { return mix(stream_ + static_cast<uint64_t>(candidate)); }
  constexpr float add_to(float score, int64_t candidate) const {
    return exists_ ? score + gumbel_of(bits(candidate)) : score;
  }

 private:
  bool exists_;
  uint64_t stream_;
};

}  // namespace arfast
