// Sampling on the CPU, a row per task.
#include "core/kept_tokens.h"
#include "core/parallel.h"
#include "sample/sample.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

template <typename T>
void sample_row(const SampleParams& params, int64_t row, KeptTokens<T>& kept) {
  int64_t* state = params.generator_state + row * params.state_stride;
  kept.read(static_cast<const T*>(params.logits) + row * params.logits_stride);
  const uint64_t bits = random_bits(state, params.state_column_stride);
  const int64_t token = kept.mass() > 0 ? kept.token_at(random_below(bits, kept.mass())) : 0;
  params.tokens[row] = token;
  params.logprobs[row] = kept.logprob(token);
  advance_state(state, params.state_column_stride, 1);
}

}  // namespace

void sample(const SampleParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(params.num_rows, grain_for(params.vocab_size), [&](int64_t first, int64_t last) {
      KeptTokens<T> kept(params.vocab_size, params.filters);
      for (int64_t row = first; row < last; ++row) sample_row(params, row, kept);
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
