// The best of many candidates in a total order, for the CPU implementations. Compiled once per instruction set,
// so nothing here may have the same name in two of them: see core/cpu_target.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "core/simd.h"

namespace arfast::ARFAST_CPU_TARGET {

// A token of a row by its logit, or a token of a group (index = parent * V + token) by its score.
struct Candidate {
  float value;
  int32_t index;
};

struct Better {
  bool operator()(Candidate a, Candidate b) const {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
  }
  bool operator()(float a, float b) const { return a > b; }
};

// The best `capacity` of all candidates pushed. A buffer of twice the capacity is cut back when it is full: constant
// time per push on average, whatever the order and the capacity.
class TopList {
 public:
  explicit TopList(int64_t capacity) : capacity_(capacity), buffer_(new Candidate[2 * capacity]) {}

  int64_t capacity() const { return capacity_; }
  int64_t size() const { return size_; }
  bool full() const { return size_ == capacity_; }
  const Candidate* begin() const { return buffer_.get(); }
  const Candidate* end() const { return buffer_.get() + size_; }

  // Smaller values need not be pushed, nor equal ones whose index is larger than all before.
  float threshold() const { return threshold_; }

  void clear() {
    size_ = 0;
    threshold_ = -kInfinity<float>;
  }

  void push(Candidate candidate) {
    if (size_ == 2 * capacity_) cut();
    buffer_[size_++] = candidate;
  }

  // Leaves at most `capacity` candidates, in no order. If it is full(), the threshold is then the worst one's value.
  void cut() {
    if (size_ < capacity_) return;
    Candidate* worst = buffer_.get() + capacity_ - 1;
    std::nth_element(buffer_.get(), worst, buffer_.get() + size_, Better());
    size_ = capacity_;
    threshold_ = worst->value;
  }

  void sort() {
    cut();
    std::sort(buffer_.get(), buffer_.get() + size_, Better());
  }

  // Raises the threshold, given values of different candidates that are going to be pushed, if they pass it; overwrites
  // `values`. It spares an empty list, or one whose candidates keep getting better, most of the pushes. Of fewer than
  // `capacity` wanted, those that tie with the last of them pass, too.
  void raise_threshold(float* values, int64_t count, int64_t wanted) {
    if (count < wanted) return;
    // The larger of two values is a value of a candidate, too; the fewer are left, the faster is the selection.
    for (; count >= 4 * wanted; count -= count / 2) {
      for (int64_t i = 0; i < count / 2; ++i) values[i] = std::max(values[i], values[count - count / 2 + i]);
    }
    std::nth_element(values, values + wanted - 1, values + count, Better());
    threshold_ = std::max(threshold_, std::nextafter(values[wanted - 1], -kInfinity<float>));
  }
  void raise_threshold(float* values, int64_t count) { raise_threshold(values, count, capacity_); }

 private:
  int64_t capacity_;
  int64_t size_ = 0;
  float threshold_ = -kInfinity<float>;
  std::unique_ptr<Candidate[]> buffer_;
};

}  // namespace arfast::ARFAST_CPU_TARGET
