// Choosing from logits by the sums of their tiles, of which most then need no look: see core/logits_tiles.h. Compiled
// once per instruction set: see core/cpu_target.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/logits_scan.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// The maxima and sums of the tiles of `num_rows` rows, [num_rows, tiles] each, from those of all rows.
struct TileSums {
  TileSums(const float* tile_sums, int64_t vocab_size, int64_t all_rows, int64_t first_row, int64_t num_rows)
      : count(num_logits_tiles(vocab_size)), maxima(new float[2 * num_rows * count]) {
    sums = maxima.get() + num_rows * count;
    for (int64_t i = 0; i < count; ++i) {
      const float* tile = tile_sums + i * all_rows + first_row;
      for (int64_t row = 0; row < num_rows; ++row) {
        maxima[row * count + i] = tile[row];
        sums[row * count + i] = tile[count * all_rows + row];
      }
    }
  }

  RowSum row_sum(int64_t row) const {
    const float *my_maxima = maxima.get() + row * count, *my_sums = sums + row * count;
    float largest = -kInfinity<float>;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, my_maxima[i]);
    VecF total{};
    const float base = std::isfinite(largest) ? largest : 0.0f;
    for_each_vector<float>(count, [&](int64_t i, int lanes) {
      const VecF weight = exp_term(-max(base - load_lanes(my_maxima + i, lanes), VecF{}));
      total += weight * load_lanes(my_sums + i, lanes);
    });
    return {largest, reduce_add(total)};
  }

  int64_t count;
  std::unique_ptr<float[]> maxima;
  float* sums;
};

template <typename T>
void prefetch_tile(const T* logits, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(logits + i);
}

// Pushes those of a tile's `count` tokens whose score, score(VecF of logits), is above the threshold. Tokens ascend, so
// an equal one comes too late.
template <typename T, typename Score>
void push_tile(const T* logits, int64_t count, int64_t first_index, const Score& score, TopList& list) {
  alignas(64) float converted[kTile];
  const float* tile = load_tile(logits, count, converted);
  for (int i = 0; i < kTile; i += kFloatLanes) {
    const VecF scores = score(load(tile + i));
    uint32_t lanes = lanes_greater(scores, splat<VecF>(list.threshold()));
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      list.push({scores[lane], static_cast<int32_t>(first_index + i + lane)});
    }
  }
}

}  // namespace
}  // namespace arfast::ARFAST_CPU_TARGET
