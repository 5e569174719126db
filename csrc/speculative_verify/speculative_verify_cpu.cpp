// Verification of drafts on the CPU, a sequence per task: position by position until a draft is rejected, so that later
// rows are not read.
#include "core/kept_tokens.h"
#include "core/parallel.h"
#include "speculative_verify/acceptance.h"
#include "speculative_verify/speculative_verify.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// A sequence for one thread, with the memory that all its sequences use.
template <typename T>
class Verifier {
 public:
  explicit Verifier(const SpeculativeVerifyParams& params)
      : params_(params), target_(params.vocab_size, params.filters), draft_(params.vocab_size, params.filters) {}

  void verify(int64_t b) {
    const int64_t num_positions = params_.num_drafts + 1;
    int64_t* state = params_.generator_state + b * params_.state_stride;
    int64_t* tokens = params_.tokens + b * num_positions;
    float* logprobs = params_.logprobs + b * num_positions;
    int64_t position = 0;
    for (bool goes_on = true; goes_on; ++position) {
      const uint64_t bits = random_bits(state, params_.state_column_stride, position);
      goes_on = verify_position(b, position, bits, tokens[position]);
      logprobs[position] = target_.logprob(tokens[position]);
    }
    params_.num_accepted[b] = static_cast<int32_t>(position - 1);
    advance_state(state, params_.state_column_stride, position);
    std::fill(tokens + position, tokens + num_positions, -1);
    std::fill(logprobs + position, logprobs + num_positions, 0.0f);
  }

 private:
  // Whether the draft is accepted; else `token` is drawn.
  bool verify_position(int64_t b, int64_t position, uint64_t bits, int64_t& token) {
    target_.read(
        row(params_.target_logits, b * params_.target_stride_batch + position * params_.target_stride_position));
    drafted_ = draft_token(params_, b, position);
    if (drafted_ < 0) {
      token = draw(bits);
      return false;
    }
    if (params_.draft_logits != nullptr) {
      draft_.read(row(params_.draft_logits, b * params_.draft_stride_batch + position * params_.draft_stride_position));
    }
    token = drafted_;
    if (accepts(acceptance_bits(bits), target_share(drafted_), draft_share(drafted_))) return true;
    token = draw_residual(bits);
    return false;
  }

  Share target_share(int64_t token) const { return {target_.weight(token), target_.mass()}; }
  Share draft_share(int64_t token) const {
    if (params_.draft_logits == nullptr || draft_.mass() == 0) return {token == drafted_, 1};
    return {draft_.weight(token), draft_.mass()};
  }

  int64_t draw(uint64_t bits) const {
    return target_.mass() > 0 ? target_.token_at(random_below(bits, target_.mass())) : 0;
  }

  int64_t draw_residual(uint64_t bits) const {
    const auto measure = [&](int64_t token, uint64_t weight) {
      return weight == 0 ? uint128{0} : residual({weight, target_.mass()}, draft_share(token));
    };
    const uint128 mass = target_.template sum<uint128>(measure);
    return mass > 0 ? target_.token_at(random_below(bits, mass), measure) : draw(bits);
  }

  static const T* row(const void* logits, int64_t offset) { return static_cast<const T*>(logits) + offset; }

  const SpeculativeVerifyParams& params_;
  KeptTokens<T> target_, draft_;
  int64_t drafted_ = -1;
};

}  // namespace

void speculative_verify(const SpeculativeVerifyParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    parallel_for(params.batch, grain_for(params.vocab_size), [&](int64_t first, int64_t last) {
      Verifier<typename decltype(tag)::type> verifier(params);
      for (int64_t b = first; b < last; ++b) verifier.verify(b);
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
