// Sampling on the CPU, a row per task: one pass for the log-sum-exp and the best tokens; where those do not hold all
// that top_k leaves, the weights of the whole row and the cuts in it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "core/logits_scan.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "sample/draw.h"
#include "sample/sample.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// A longer list costs more than the weights of the whole row.
constexpr int64_t kLongestListed = 1024;

// Larger for larger floats; -0 counts as 0.
uint32_t order_of(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// How far a score lies below the best one, which may be infinite.
float distance_of(float score, float best) { return score == best ? 0.0f : best - score; }

struct Ranked {
  uint64_t rank;
  uint64_t weight;
};

// Of `count` tokens in any order, those that have a weight of 0 included: the rank of the first one, in their order, at
// which the running sum of the weights reaches `limit`; 0 if none does.
uint64_t rank_at(const Ranked* tokens, int64_t count, uint64_t limit) {
  uint64_t sums[256] = {};
  for (int64_t i = 0; i < count; ++i) sums[tokens[i].rank >> 56] += tokens[i].weight;
  uint64_t before = 0;
  int step = 255;
  for (; step >= 0 && limit - before > sums[step]; --step) before += sums[step];
  if (step < 0) return 0;
  std::vector<Ranked> rest;
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i].rank >> 56 == static_cast<uint64_t>(step)) rest.push_back(tokens[i]);
  }
  const auto better = [](const Ranked& a, const Ranked& b) { return a.rank > b.rank; };
  Ranked *first = rest.data(), *last = first + rest.size();
  while (last - first > 1) {
    Ranked* middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, better);
    uint64_t sum = 0;
    for (const Ranked* token = first; token < middle; ++token) sum += token->weight;
    if (limit - before <= sum) {
      last = middle;
    } else {
      before += sum;
      first = middle;
    }
  }
  return first->rank;
}

uint64_t mass_of(const Ranked* tokens, int64_t count) {
  uint64_t mass = 0;
  for (int64_t i = 0; i < count; ++i) mass += tokens[i].weight;
  return mass;
}

// A row for one thread, with the memory that all its rows use.
template <typename T>
class RowSampler {
 public:
  explicit RowSampler(const SampleParams& params)
      : params_(params),
        num_segments_((params.vocab_size + kSegment - 1) / kSegment),
        sums_(new PartialSum[num_segments_]),
        // So many more than top_k that ties with the last one rarely go beyond the list.
        list_(params.top_k <= kLongestListed ? 2 * params.top_k + 32 : 1) {}

  void sample(int64_t row) {
    logits_ = static_cast<const T*>(params_.logits) + row * params_.logits_stride;
    int64_t* state = params_.generator_state + row * params_.state_stride;
    const RowSum sum = scan();
    best_ = score(sum.max);
    int64_t token = 0;
    if (best_ > -kInfinity) {
      if (!take_list()) take_row();
      token = draw(state);
    }
    params_.tokens[row] = token;
    params_.logprobs[row] = static_cast<float>(logit(token) - sum.max - std::log(sum.sum));
    int64_t& step = state[2 * params_.state_column_stride];
    step = static_cast<int64_t>(static_cast<uint64_t>(step) + 1);
  }

 private:
  bool listed() const { return params_.top_k > 0 && params_.top_k <= kLongestListed; }
  float logit(int64_t token) const { return static_cast<float>(to_acc(logits_[token])); }
  float score(float x) const { return x / params_.temperature; }

  RowSum scan() {
    list_.clear();
    for (int64_t i = 0; i < num_segments_; ++i) {
      segment_.first_token = i * kSegment;
      segment_.size = std::min(kSegment, params_.vocab_size - segment_.first_token);
      segment_.logits = logits_ + segment_.first_token;
      segment_.banned = nullptr;
      sums_[i] = sum_segment(segment_);
      if (listed()) select_from_segment(segment_, list_);
    }
    return merge_sums(sums_.get(), num_segments_);
  }

  Ranked ranked(float x, int64_t token) const {
    const float s = score(x);
    if (!(s > -kInfinity)) return {0, 0};
    const float distance = distance_of(s, best_);
    return {rank_of(distance, order_of(s), token), weight_of(distance)};
  }

  // What top_k leaves, from the list; false if tokens beyond it may tie with its last one.
  bool take_list() {
    if (!listed()) return false;
    list_.sort();
    const Candidate* best = list_.begin();
    count_ = list_.size();
    if (count_ > params_.top_k) {
      const float smallest = score(best[params_.top_k - 1].value);
      if (list_.full() && score(best[count_ - 1].value) == smallest) return false;
      while (score(best[count_ - 1].value) < smallest) --count_;
    }
    reserve(2 * params_.top_k + 32);
    for (int64_t i = 0; i < count_; ++i) tokens_[i] = ranked(best[i].value, best[i].index);
    const auto before = [](const Ranked& a, const Ranked& b) { return token_in_rank(a.rank) < token_in_rank(b.rank); };
    std::sort(tokens_.get(), tokens_.get() + count_, before);
    return true;
  }

  // The same from the whole row.
  void take_row() {
    count_ = params_.vocab_size;
    reserve(count_);
    for (int64_t i = 0; i < count_; ++i) tokens_[i] = ranked(logit(i), i);
    if (params_.top_k == 0 || params_.top_k >= count_) return;
    std::vector<Ranked> ones(tokens_.get(), tokens_.get() + count_);
    for (Ranked& token : ones) token.weight = token.rank != 0;
    drop_after(last_tie(rank_at(ones.data(), count_, static_cast<uint64_t>(params_.top_k))));
  }

  void reserve(int64_t count) {
    if (count > capacity_) tokens_.reset(new Ranked[count]);
    capacity_ = std::max(capacity_, count);
  }

  void drop_after(uint64_t last_rank) {
    for (int64_t i = 0; i < count_; ++i) tokens_[i].weight = tokens_[i].rank < last_rank ? 0 : tokens_[i].weight;
  }

  // Applies top_p and min_p to what top_k left, in ascending order of tokens, and draws.
  int64_t draw(const int64_t* state) {
    if (params_.top_p < 1) {
      drop_after(rank_at(tokens_.get(), count_, nucleus_limit(params_.top_p, mass_of(tokens_.get(), count_))));
    }
    for (int64_t i = 0; i < count_; ++i) {
      if (tokens_[i].weight < params_.min_weight) tokens_[i].weight = 0;
    }
    const uint64_t number = random_below(state, params_.state_column_stride, mass_of(tokens_.get(), count_));
    const Ranked* token = tokens_.get();
    for (uint64_t sum = token->weight; sum <= number; sum += token->weight) ++token;
    return token_in_rank(token->rank);
  }

  const SampleParams& params_;
  int64_t num_segments_;
  std::unique_ptr<PartialSum[]> sums_;
  TopList list_;
  Segment<T> segment_;
  const T* logits_ = nullptr;
  float best_ = 0;  // score
  std::unique_ptr<Ranked[]> tokens_;
  int64_t capacity_ = 0;
  int64_t count_ = 0;
};

}  // namespace

void sample(const SampleParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    parallel_for(params.num_rows, grain_for(params.vocab_size), [&](int64_t first, int64_t last) {
      RowSampler<typename decltype(tag)::type> sampler(params);
      for (int64_t row = first; row < last; ++row) sampler.sample(row);
    });
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
