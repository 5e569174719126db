// The tokens of a row that temperature, top_k, top_p and min_p keep, with their weights, for the CPU implementations:
// one pass for the log-sum-exp and the best tokens; where those do not hold all that top_k leaves, the weights of the
// whole row. Compiled once per instruction set: see core/cpu_target.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "core/logits_scan.h"
#include "core/tile_sums.h"
#include "core/token_weights.h"

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

// One row at a time, with memory that serves all that it reads.
template <typename T>
class KeptTokens {
 public:
  KeptTokens(int64_t vocab_size, const TokenFilters& filters)
      : vocab_size_(vocab_size),
        filters_(filters),
        num_segments_((vocab_size + kSegment - 1) / kSegment),
        sums_(new PartialSum[num_segments_]),
        // So many more than top_k that ties with the last one rarely go beyond the list.
        list_(filters.top_k <= kLongestListed ? 2 * filters.top_k + 32 : 1) {}

  // `tiles`: of this row alone, of which then only the few tiles are read that can hold a listed token.
  void read(const T* logits, const TileSums* tiles = nullptr) {
    logits_ = logits;
    list_.clear();
    if (tiles != nullptr) {
      scan_tiles(*tiles);
    } else {
      scan();
    }
    best_ = score(sum_.max);
    mass_ = 0;
    count_ = 0;
    if (best_ == -kInfinity<float>) return;
    is_list_ = take_list();
    if (!is_list_) take_row();
    mass_ = sum<uint64_t>([](int64_t, uint64_t weight) { return weight; });
  }

  // Of all that is kept; 0 if the row has nothing but -infinity and NaN.
  uint64_t mass() const { return mass_; }

  // 0 for a token that is not kept.
  uint64_t weight(int64_t token) const {
    if (mass_ == 0) return 0;
    if (!is_list_) return weights_[token];
    const int64_t *first = tokens_.get(), *last = first + count_;
    const int64_t* place = std::lower_bound(first, last, token, [](int64_t a, int64_t b) { return a < b; });
    return place < last && *place == token ? weights_[place - first] : 0;
  }

  // The sum of measure(token, weight).
  template <typename Sum, typename Measure>
  Sum sum(const Measure& measure) const {
    Sum sum = 0;
    for (int64_t i = 0; i < count_; ++i) sum += measure(token_of(i), weights_[i]);
    return sum;
  }

  // The first token, in ascending order, at which the running sum of measure(token, weight) exceeds `number`.
  template <typename Sum, typename Measure>
  int64_t token_at(Sum number, const Measure& measure) const {
    int64_t i = 0;
    for (Sum sum = measure(token_of(0), weights_[0]); sum <= number; sum += measure(token_of(i), weights_[i])) ++i;
    return token_of(i);
  }

  // The token that a number below mass() draws.
  int64_t token_at(uint64_t number) const {
    return token_at(number, [](int64_t, uint64_t weight) { return weight; });
  }

  // Of the model's own distribution; NaN where a logit is NaN or infinity.
  float logprob(int64_t token) const { return static_cast<float>(logit(token) - sum_.max - std::log(sum_.sum)); }

 private:
  bool listed() const { return filters_.top_k > 0 && filters_.top_k <= kLongestListed; }
  float logit(int64_t token) const { return static_cast<float>(to_acc(logits_[token])); }
  float score(float x) const { return x / filters_.temperature; }
  int64_t token_of(int64_t i) const { return is_list_ ? tokens_[i] : i; }

  void scan() {
    for (int64_t i = 0; i < num_segments_; ++i) {
      segment_.first_token = i * kSegment;
      segment_.size = std::min(kSegment, vocab_size_ - segment_.first_token);
      segment_.logits = logits_ + segment_.first_token;
      segment_.banned = nullptr;
      sums_[i] = sum_segment(segment_);
      if (listed()) select_from_segment(segment_, list_);
    }
    sum_ = merge_sums(sums_.get(), num_segments_);
  }

  void scan_tiles(const TileSums& tiles) {
    sum_ = tiles.row_sum(0);
    if (!listed()) return;
    // What ties with the last of top_k is listed, too: where no division makes ties, that is all there is to list.
    const int64_t most = filters_.temperature == 1 ? filters_.top_k : list_.capacity();
    std::unique_ptr<float[]> bounds(new float[tiles.count]);
    std::copy_n(tiles.maxima.get(), tiles.count, bounds.get());
    list_.raise_threshold(bounds.get(), tiles.count, most);
    const auto for_each_better = [&](const auto& visit) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t first = i * kTile;
        if (tiles.maxima[i] > list_.threshold()) visit(first, std::min<int64_t>(kTile, vocab_size_ - first));
      }
    };
    for_each_better([&](int64_t first, int64_t count) { prefetch_tile(logits_ + first, count); });
    for_each_better([&](int64_t first, int64_t count) {
      push_tile(logits_ + first, count, first, [](VecF x) { return x; }, list_);
    });
  }

  uint64_t rank(float x, int64_t token) const {
    const float s = score(x);
    return s > -kInfinity<float> ? rank_of(distance_of(s, best_), order_of(s), token) : 0;
  }
  uint64_t weight_at(float x) const { return weight_of(distance_of(score(x), best_)); }

  // From the list; false if tokens beyond it may tie with the last one that top_k leaves.
  bool take_list() {
    if (!listed()) return false;
    list_.sort();
    const Candidate* best = list_.begin();
    int64_t count = list_.size();
    if (count > filters_.top_k) {
      const float smallest = score(best[filters_.top_k - 1].value);
      if (list_.full() && score(best[count - 1].value) == smallest) return false;
      while (score(best[count - 1].value) < smallest) --count;
    }
    ranked_.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) ranked_[i] = {rank(best[i].value, best[i].index), weight_at(best[i].value)};
    const auto before = [](const Ranked& a, const Ranked& b) { return token_in_rank(a.rank) < token_in_rank(b.rank); };
    std::sort(ranked_.begin(), ranked_.end(), before);
    cut_top_p();
    reserve(count);
    for (const Ranked& token : ranked_) {
      if (token.weight == 0 || token.weight < filters_.min_weight) continue;
      tokens_[count_] = token_in_rank(token.rank);
      weights_[count_++] = token.weight;
    }
    return true;
  }

  // From the whole row, with weights of 0 for what is not kept.
  void take_row() {
    reserve((vocab_size_ + kTile - 1) / kTile * kTile);
    alignas(64) float converted[kTile];
    for (int64_t first = 0; first < vocab_size_; first += kTile) {
      const float* tile = load_tile(logits_ + first, std::min<int64_t>(kTile, vocab_size_ - first), converted);
      for (int i = 0; i < kTile; ++i) weights_[first + i] = weight_at(tile[i]);
    }
    count_ = vocab_size_;
    const bool cuts_top_k = filters_.top_k > 0 && filters_.top_k < vocab_size_;
    if (cuts_top_k || filters_.top_p < 1) {
      ranked_.resize(static_cast<size_t>(count_));
      for (int64_t i = 0; i < count_; ++i) ranked_[i] = {rank(logit(i), i), weights_[i]};
      if (cuts_top_k) cut_top_k();
      cut_top_p();
      for (int64_t i = 0; i < count_; ++i) weights_[i] = ranked_[i].weight;
    }
    for (int64_t i = 0; i < count_; ++i) weights_[i] = weights_[i] < filters_.min_weight ? 0 : weights_[i];
  }

  void cut_top_k() {
    std::vector<Ranked> ones(ranked_);
    for (Ranked& token : ones) token.weight = token.rank != 0;
    drop_after(last_tie(rank_at(ones.data(), count_, static_cast<uint64_t>(filters_.top_k))));
  }

  void cut_top_p() {
    if (filters_.top_p >= 1) return;
    uint64_t mass = 0;
    for (const Ranked& token : ranked_) mass += token.weight;
    const int64_t count = static_cast<int64_t>(ranked_.size());
    drop_after(rank_at(ranked_.data(), count, nucleus_limit(filters_.top_p, mass)));
  }

  void drop_after(uint64_t last_rank) {
    for (Ranked& token : ranked_) token.weight = token.rank < last_rank ? 0 : token.weight;
  }

  void reserve(int64_t count) {
    if (count <= capacity_) return;
    weights_.reset(new uint64_t[count]);
    tokens_.reset(new int64_t[count]);
    capacity_ = count;
  }

  int64_t vocab_size_;
  TokenFilters filters_;
  int64_t num_segments_;
  std::unique_ptr<PartialSum[]> sums_;
  TopList list_;
  Segment<T> segment_;
  const T* logits_ = nullptr;
  RowSum sum_{};
  float best_ = 0;  // score
  std::vector<Ranked> ranked_;
  bool is_list_ = false;
  std::unique_ptr<int64_t[]> tokens_;  // of a list, ascending
  std::unique_ptr<uint64_t[]> weights_;
  int64_t capacity_ = 0;
  int64_t count_ = 0;
  uint64_t mass_ = 0;
};

}  // namespace
}  // namespace arfast::ARFAST_CPU_TARGET
