// Several loops of tasks, one after the other, within a single parallel region: a region for each would cost more than
// the work of a small one.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "core/parallel.h"
#include "core/simd.h"

namespace arfast::ARFAST_CPU_TARGET {

// Tasks of a share that are taken, counted from the first phase on.
struct alignas(64) PhaseShare {
  std::atomic<int64_t> taken{0};
};

// What the threads know of each other.
struct PhaseCounters {
  explicit PhaseCounters(int64_t num_shares) : shares(num_shares) {}

  std::vector<PhaseShare> shares;
  alignas(64) std::atomic<int64_t> done{0};  // tasks, of all phases
  std::atomic<int64_t> arrived{0};           // threads
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // the first that a task threw
};

// One thread's way through the phases. The tasks of a phase are divided into shares, one for each thread, which does
// its own in order, so that it reads memory in order, and then what others have left. It waits only for tasks that
// others have taken, so it does not matter how many threads there are, nor when they arrive: alone, one does it all.
class Phases {
 public:
  explicit Phases(PhaseCounters& counters)
      : counters_(counters),
        num_shares_(static_cast<int64_t>(counters.shares.size())),
        own_(counters.arrived.fetch_add(1) % num_shares_),
        ends_(num_shares_) {}

  struct Range {
    int64_t begin, end;
  };

  // Which tasks of a phase are this thread's own.
  Range own_share(int64_t count) const { return share_of(count, own_); }

  // Calls f(i) for every i in [0, count), each once on some thread, and returns when all are done. Every thread makes
  // the same calls of `run` in the same order. Which thread runs a task must not matter to its result. A task that
  // throws is done, or the others would wait for it forever.
  template <typename F>
  void run(int64_t count, const F& f) {
    end_ += count;
    int64_t mine = 0;
    for (int64_t i = 0; i < num_shares_; ++i) {
      const int64_t share = (own_ + i) % num_shares_, before = ends_[share];
      const Range range = share_of(count, share);
      ends_[share] += range.end - range.begin;
      mine += run_share(counters_.shares[share].taken, range.begin - before, ends_[share], f);
    }
    if (mine > 0) counters_.done.fetch_add(mine, std::memory_order_acq_rel);
    for (int spins = 0; counters_.done.load(std::memory_order_acquire) < end_; ++spins) wait(spins);
  }

 private:
  Range share_of(int64_t count, int64_t share) const {
    return {count * share / num_shares_, count * (share + 1) / num_shares_};
  }

  // Takes tasks of a share until `end` of them are taken; f gets their number plus `offset`. -> how many
  template <typename F>
  int64_t run_share(std::atomic<int64_t>& taken, int64_t offset, int64_t end, const F& f) {
    int64_t mine = 0;
    for (int64_t task = taken.load(std::memory_order_relaxed); task < end;) {
      if (!taken.compare_exchange_weak(task, task + 1, std::memory_order_relaxed)) continue;
      try {
        f(task + offset);
      } catch (...) {
        if (!counters_.failed.exchange(true)) counters_.error = std::current_exception();
      }
      ++mine;
      task = taken.load(std::memory_order_relaxed);
    }
    return mine;
  }

  // A task is short, unless its thread does not run: then the core is better left to it.
  static void wait(int spins) {
    constexpr int kMostSpins = 1000;
    if (spins >= kMostSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  PhaseCounters& counters_;
  const int64_t num_shares_, own_;
  std::vector<int64_t> ends_;  // of each share, so far
  int64_t end_ = 0;            // of all
};

// Calls f(phases) on up to `num_shares` threads, then throws what a task has thrown.
template <typename F>
void run_phases(int64_t num_shares, const F& f) {
  PhaseCounters counters(num_shares);
  parallel_for(num_shares, 1, [&](int64_t, int64_t) {
    Phases phases(counters);
    f(phases);
  });
  if (counters.error) std::rethrow_exception(counters.error);
}

}  // namespace arfast::ARFAST_CPU_TARGET
