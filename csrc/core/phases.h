// Several loops of tasks, one after the other, within a single parallel region: a region for each would cost more than
// the work of a small one.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

#include "core/parallel.h"
#include "core/simd.h"

namespace arfast::ARFAST_CPU_TARGET {

// Tasks that are taken and done, counted from the first phase on.
struct PhaseCounters {
  alignas(64) std::atomic<int64_t> taken{0};
  alignas(64) std::atomic<int64_t> done{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // the first that a task threw
};

// One thread's way through the phases. Threads take tasks when they are free for them and wait only for tasks that
// others have taken, so it does not matter how many of them there are, nor when they arrive: alone, one does it all.
class Phases {
 public:
  explicit Phases(PhaseCounters& counters) : counters_(counters) {}

  // Calls f(i) for every i in [0, count), each once on some thread, and returns when all are done. Every thread makes
  // the same calls of `run` in the same order. Which thread runs a task must not matter to its result. A task that
  // throws is done, or the others would wait for it forever.
  template <typename F>
  void run(int64_t count, const F& f) {
    const int64_t begin = end_;
    end_ += count;
    int64_t mine = 0;
    for (int64_t task = counters_.taken.load(std::memory_order_relaxed); task < end_;) {
      if (!counters_.taken.compare_exchange_weak(task, task + 1, std::memory_order_relaxed)) continue;
      try {
        f(task - begin);
      } catch (...) {
        if (!counters_.failed.exchange(true)) counters_.error = std::current_exception();
      }
      ++mine;
      task = counters_.taken.load(std::memory_order_relaxed);
    }
    if (mine > 0) counters_.done.fetch_add(mine, std::memory_order_acq_rel);
    for (int spins = 0; counters_.done.load(std::memory_order_acquire) < end_; ++spins) wait(spins);
  }

 private:
  // A task is short, unless its thread does not run: then the core is better left to it.
  static void wait(int spins) {
    constexpr int kMostSpins = 1000;
    if (spins >= kMostSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  PhaseCounters& counters_;
  int64_t end_ = 0;
};

// Calls f(phases) on as many threads as there are for the phase of the most tasks, then throws what a task has thrown.
template <typename F>
void run_phases(int64_t most_tasks, const F& f) {
  PhaseCounters counters;
  parallel_for(most_tasks, 1, [&](int64_t, int64_t) {
    Phases phases(counters);
    f(phases);
  });
  if (counters.error) std::rethrow_exception(counters.error);
}

}  // namespace arfast::ARFAST_CPU_TARGET
