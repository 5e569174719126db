// Memory of a thread that outlives the call: touching fresh pages costs more than the work of many tiles.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "core/simd.h"

namespace arfast::ARFAST_CPU_TARGET {

// At least `size` elements from the start of a cache line on, valid until the next call of this thread for the same
// use: code that holds such memory while other code takes some names a use of its own.
template <typename A, typename Use = void>
A* thread_scratch(int64_t size) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t capacity = 0;
  if (size > capacity) {
    memory.reset(std::aligned_alloc(64, (size * sizeof(A) + 63) / 64 * 64));
    capacity = memory ? size : 0;
    if (!memory) throw std::bad_alloc();
  }
  return static_cast<A*>(memory.get());
}

// Hands out parts of a thread's scratch memory, each starting at a cache line.
template <typename A, typename Use = void>
class Arena {
 public:
  explicit Arena(int64_t size) : next_(thread_scratch<A, Use>(size)) {}
  A* take(int64_t size) {
    A* part = next_;
    next_ += padded(size);
    return part;
  }
  static int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

 private:
  A* next_;
};

}  // namespace arfast::ARFAST_CPU_TARGET
