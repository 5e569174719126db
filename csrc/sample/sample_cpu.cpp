// Sampling on the CPU, a row per task.
#include "core/kept_tokens.h"
#include "core/parallel.h"
#include "sample/sample.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// Calls write(token, logprob) with the token that a row draws.
template <typename T, typename F>
void draw(const SampleParams& params, int64_t row, const TileSums* tiles, KeptTokens<T>& kept, const F& write) {
  int64_t* state = params.generator_state + row * params.state_stride;
  kept.read(static_cast<const T*>(params.logits) + row * params.logits_stride, tiles);
  const uint64_t bits = random_bits(state, params.state_column_stride);
  const int64_t token = kept.mass() > 0 ? kept.token_at(random_below(bits, kept.mass())) : 0;
  write(token, kept.logprob(token));
  advance_state(state, params.state_column_stride, 1);
}

// Calls f(row, kept) for all rows; `work` is that of a row.
template <typename F>
void for_each_row(const SampleParams& params, int64_t work, const F& f) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    parallel_for(params.num_rows, grain_for(work), [&](int64_t first, int64_t last) {
      KeptTokens<typename decltype(tag)::type> kept(params.vocab_size, params.filters);
      for (int64_t row = first; row < last; ++row) f(row, kept);
    });
  });
}

}  // namespace

void sample(const SampleParams& params) {
  for_each_row(params, params.vocab_size, [&](int64_t row, auto& kept) {
    draw(params, row, nullptr, kept, [&](int64_t token, float logprob) {
      params.tokens[row] = token;
      params.logprobs[row] = logprob;
    });
  });
}

void sample_step(const SampleStepParams& params) {
  const bool tiled = params.tile_sums != nullptr;
  const int64_t work = tiled ? num_logits_tiles(params.vocab_size) + kTile : params.vocab_size;
  for_each_row(params, work, [&](int64_t row, auto& kept) {
    if (!goes_on(params.state, row)) return feed_padding(params.state, row);
    const auto write = [&](int64_t token, float logprob) { append(params.state, row, token, logprob); };
    if (!tiled) return draw(params, row, nullptr, kept, write);
    const TileSums tiles(params.tile_sums, params.vocab_size, params.num_rows, row, 1);
    draw(params, row, &tiles, kept, write);
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
