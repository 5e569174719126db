// Sampling on the CPU, a row per task.
#include "core/kept_tokens.h"
#include "core/parallel.h"
#include "sample/sample.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

template <typename T>
void sample_row(const SampleParams& params, int64_t row, KeptTokens<T>& kept) {
  if (!takes_token(params, row)) return feed_padding(params.state, row);
  int64_t* state = params.generator_state + row * params.state_stride;
  const T* logits = static_cast<const T*>(params.logits) + row * params.logits_stride;
  if (params.tile_sums != nullptr) {
    const TileSums tiles(params.tile_sums, params.vocab_size, params.num_rows, row, 1);
    kept.read(logits, &tiles);
  } else {
    kept.read(logits);
  }
  const uint64_t bits = random_bits(state, params.state_column_stride);
  const int64_t token = kept.mass() > 0 ? kept.token_at(random_below(bits, kept.mass())) : 0;
  write_token(params, row, token, kept.logprob(token));
  advance_state(state, params.state_column_stride, 1);
}

}  // namespace

void sample(const SampleParams& params) {
  const int64_t work = params.tile_sums != nullptr ? num_logits_tiles(params.vocab_size) + kTile : params.vocab_size;
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(params.num_rows, grain_for(work), [&](int64_t first, int64_t last) {
      KeptTokens<T> kept(params.vocab_size, params.filters);
      for (int64_t row = first; row < last; ++row) sample_row(params, row, kept);
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
