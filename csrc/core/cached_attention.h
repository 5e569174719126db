// Attention of a few query rows to the cached keys and values of one head on the CPU: a running softmax over tiles of
// keys (Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1), each read once for all rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/arena.h"
#include "core/simd.h"
#include "core/transpose.h"

namespace arfast::ARFAST_CPU_TARGET {

constexpr int64_t kCachedTile = 64;  // keys that are packed and multiplied at a time

template <typename A>
inline int64_t round_up_to_lanes(int64_t size) {
  return (size + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// 2^x for x <= 1, at most 1 ulp in the normal range, smaller ones 0; NaN stays NaN. Minimax polynomial on [-1/2, 1/2].
inline VecF exp2_bounded(VecF x) {
  const VecF clamped = x < -126.0f ? splat<VecF>(-126.0f) : x;
  const VecF shifted = clamped + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer, which lies in the low bits
  const VecF r = clamped - (shifted - 12582912.0f);
  VecF p = splat<VecF>(1.5345812e-4f);
  p = p * r + 1.3399931e-3f;
  p = p * r + 9.6184890e-3f;
  p = p * r + 5.5503288e-2f;
  p = p * r + 2.4022647e-1f;
  p = p * r + 6.9314721e-1f;
  p = p * r + 1.0f;
  const VecF power = reinterpret_cast<VecF>((reinterpret_cast<VecI>(shifted) - (0x4b400000 - 127)) << 23);
  return x < -126.0f ? VecF{} : p * power;
}
inline VecD exp2_bounded(VecD x) {
  VecD v = x;
  for (int lane = 0; lane < kDoubleLanes; ++lane) v[lane] = std::exp2(x[lane]);
  return v;
}

// The lanes from `first` to `last`, as a mask for ?:.
template <typename A>
inline auto lanes_between(int64_t first, int64_t last) {
  Vec<A> lanes{};
  for (int lane = 0; lane < kLanes<A>; ++lane) lanes[lane] = static_cast<A>(lane);
  const auto bound = [](int64_t lane) { return static_cast<A>(std::clamp<int64_t>(lane, -1, kLanes<A>)); };
  return (lanes >= bound(first)) & (lanes <= bound(last));
}

// `count` rows of `size` elements -> target [count, ld], zeros up to the next multiple of the lanes.
template <typename T, typename Rows>
inline void pack_rows(const Rows& rows, int64_t count, int64_t size, Acc<T>* target, int64_t ld) {
  for (int64_t row = 0; row < count; ++row) {
    const T* source = rows[row];
    for_each_vector<T>(size,
                       [&](int64_t i, int lanes) { store(target + row * ld + i, load_lanes(source + i, lanes)); });
  }
}

// Scores of kLanes pairs of a row and a key: their partial sums are added while they are transposed into one vector.
// size is a multiple of the lanes.
template <typename T, int kRows>
inline void multiply_keys(const Acc<T>* queries, int64_t ld, const T* const* keys, int64_t size, Acc<T>* scores) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>, kKeys = kL / kRows;
  V sum[kL] = {};
  int64_t i = 0;
  do {
    V key[kKeys];
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) key[k] = load(keys[k] + i);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const V query = load(queries + row * ld + i);
#pragma GCC unroll 16
      for (int k = 0; k < kKeys; ++k) sum[row * kKeys + k] += query * key[k];
    }
    i += kL;
  } while (i < size);
  Acc<T> products[kL];
  store(products, add_transposed(sum));
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
    std::memcpy(scores + row * kCachedTile, products + row * kKeys, sizeof(V) / kRows);
}

// out [kRows, kVectors] += weights [kRows, num_keys] values [num_keys, kVectors], from a column on.
template <typename T, int kRows, int kVectors>
inline void multiply_values(const Acc<T>* weights, const T* const* values, int64_t num_keys, int64_t column,
                            Acc<T>* out, int64_t ld) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  V sum[kRows][kVectors] = {};
  for (int64_t key = 0; key < num_keys; ++key) {
    V value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = load(values[key] + column + v * kL);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[row][v] += weights[row * kCachedTile + key] * value[v];
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Acc<T>* p = out + row * ld + column + v * kL;
      store(p, load(p) + sum[row][v]);
    }
  }
}

// Calls f(number of rows as a compile-time constant, first row) for blocks of at most 4 rows, and at most kLanes.
template <typename A, typename F>
inline void for_each_row_block(int64_t rows, const F& f) {
  int64_t row = 0;
  if constexpr (kLanes<A> >= 4) {
    for (; row + 4 <= rows; row += 4) f(std::integral_constant<int, 4>{}, row);
  }
  for (; row + 2 <= rows; row += 2) f(std::integral_constant<int, 2>{}, row);
  if (row < rows) f(std::integral_constant<int, 1>{}, row);
}

// The rows' weighted sums of values, their maximal scores and the sums of their weights, all relative to the maximum.
// Scores stay as they leave the product until the exponent, which takes them to base 2; softcap scales them itself.
template <typename T>
class CachedAttention {
 public:
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int kL = kLanes<A>;

  // softcap 0: none. The memory is the thread's: one object at a time.
  CachedAttention(int64_t rows, int64_t head_dim, double softmax_scale, double softcap)
      : rows_(rows),
        head_dim_(head_dim),
        ld_(round_up_to_lanes<A>(head_dim)),
        exponent_scale_(static_cast<A>((softcap > 0 ? 1 : softmax_scale) * 1.4426950408889634)),
        softcap_(static_cast<A>(softcap)),
        inside_softcap_(static_cast<A>(softcap > 0 ? softmax_scale / softcap : 0)),
        arena_(2 * Arena<A>::padded(rows * ld_) + 2 * kCachedTile * ld_ + rows * kCachedTile +
               2 * Arena<A>::padded(rows)),
        queries_(arena_.take(rows * ld_)),
        out_(arena_.take(rows * ld_)),
        packed_keys_(arena_.take(kCachedTile * ld_)),
        packed_values_(arena_.take(kCachedTile * ld_)),
        scores_(arena_.take(rows * kCachedTile)),
        maximum_(arena_.take(rows)),
        sum_(arena_.take(rows)) {
    std::fill_n(out_, rows * ld_, A{0});
    std::fill_n(maximum_, rows, -kInfinity<A>);
    std::fill_n(sum_, rows, A{0});
  }

  // query: [D] in T or A
  template <typename Q>
  void set_query(int64_t row, const Q* query) {
    pack_rows<Q>(&query, 1, head_dim_, queries_ + row * ld_, ld_);
  }

  // A tile of at most kCachedTile keys and values [D], in arrays that have room for a whole tile. first(row) and
  // last(row): the keys of the tile that the row sees, in or out of its bounds.
  template <typename First, typename Last>
  void visit(const T** keys, const T* const* values, int64_t num_keys, const First& first, const Last& last) {
    // Scores come kLanes at a time: past the end the last key is repeated, and its scores are masked.
    std::fill(keys + num_keys, keys + kCachedTile, keys[num_keys - 1]);
    if (head_dim_ == ld_) return visit_rows<T>(keys, values, num_keys, first, last);
    pack_rows<T>(keys, kCachedTile, head_dim_, packed_keys_, ld_);
    pack_rows<T>(values, num_keys, head_dim_, packed_values_, ld_);
    const A *key_rows[kCachedTile], *value_rows[kCachedTile];
    for (int64_t i = 0; i < kCachedTile; ++i) {
      key_rows[i] = packed_keys_ + i * ld_;
      value_rows[i] = packed_values_ + i * ld_;
    }
    visit_rows<A>(key_rows, value_rows, num_keys, first, last);
  }

  const A* out(int64_t row) const { return out_ + row * ld_; }  // [D]
  A maximum(int64_t row) const { return maximum_[row]; }
  A sum(int64_t row) const { return sum_[row]; }

 private:
  // U: the type of the rows, which are a multiple of the lanes long.
  template <typename U, typename First, typename Last>
  void visit_rows(const U* const* keys, const U* const* values, int64_t num_keys, const First& first,
                  const Last& last) {
    for_each_row_block<A>(rows_, [&](auto count, int64_t row) {
      constexpr int kRows = count, kKeys = kL / kRows;
      for (int64_t i = 0; i < num_keys; i += kKeys) {
        multiply_keys<U, kRows>(queries_ + row * ld_, ld_, keys + i, ld_, scores_ + row * kCachedTile + i);
      }
    });
    for (int64_t row = 0; row < rows_; ++row) add_scores(row, num_keys, first(row), std::min(last(row), num_keys - 1));
    for_each_row_block<A>(rows_, [&](auto count, int64_t row) {
      constexpr int kRows = count;
      int64_t column = 0;
      for (; column + 4 * kL <= ld_; column += 4 * kL) {
        multiply_values<U, kRows, 4>(scores_ + row * kCachedTile, values, num_keys, column, out_ + row * ld_, ld_);
      }
      for (; column < ld_; column += kL) {
        multiply_values<U, kRows, 1>(scores_ + row * kCachedTile, values, num_keys, column, out_ + row * ld_, ld_);
      }
    });
  }

  // Online softmax of one row: scores become weights relative to the new maximum.
  void add_scores(int64_t row, int64_t num_keys, int64_t first, int64_t last) {
    A* scores = scores_ + row * kCachedTile;
    V highest = splat<V>(maximum_[row]);
    for (int64_t i = 0; i < num_keys; i += kL) {
      V score = load(scores + i);
      if (softcap_ > 0) score = softcap_ * tanh(score * inside_softcap_);
      if (i < first || i + kL - 1 > last) {
        score = lanes_between<A>(first - i, last - i) ? score : splat<V>(-kInfinity<A>);
      }
      store(scores + i, score);
      highest = max(score, highest);
    }
    const A maximum = reduce_max(highest);
    const A reference = maximum == -kInfinity<A> ? 0 : maximum;
    V sum{};
    for (int64_t i = 0; i < num_keys; i += kL) {
      const V weight = exp2_bounded((load(scores + i) - reference) * exponent_scale_);
      store(scores + i, weight);
      sum += weight;
    }
    if (maximum > maximum_[row]) {
      const A factor = std::exp2((maximum_[row] - maximum) * exponent_scale_);
      sum_[row] *= factor;
      A* out = out_ + row * ld_;
      for (int64_t i = 0; i < ld_; i += kL) store(out + i, load(out + i) * factor);
    }
    sum_[row] += reduce_add(sum);
    maximum_[row] = maximum;
  }

  const int64_t rows_, head_dim_, ld_;
  const A exponent_scale_, softcap_, inside_softcap_;
  Arena<A> arena_;
  A *queries_, *out_;                // [rows, ld]
  A *packed_keys_, *packed_values_;  // [kCachedTile, ld]
  A* scores_;                        // [rows, kCachedTile]
  A *maximum_, *sum_;                // [rows]
};

}  // namespace arfast::ARFAST_CPU_TARGET
