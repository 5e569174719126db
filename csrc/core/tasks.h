// Tasks of different lengths over torch's threads.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/parallel.h"

namespace arfast {

// Calls f(i) for every i in [0, count), each once; a thread takes the next one when it is done. Which thread runs a
// task must not matter to its result.
template <typename F>
void run_tasks(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  parallel_for(count, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
  });
}

}  // namespace arfast
