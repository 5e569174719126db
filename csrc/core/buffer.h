// Working memory of the CPU implementations. In the namespace of the target, unlike std::vector<float>, of which the
// linker would keep one copy for all targets, compiled for any of them.
#pragma once

#include <cstdint>
#include <new>

#include "core/simd.h"

namespace arfast::ARFAST_CPU_TARGET {

// Uninitialised, from the start of a cache line on.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<A*>(operator new(size * sizeof(A), kAlignment))) {}
  ~Buffer() { operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* data() const { return data_; }
  A& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  A* data_;
};

}  // namespace arfast::ARFAST_CPU_TARGET
