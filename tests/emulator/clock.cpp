// Vector clocks: see clock.h.
#include "emulator/clock.h"

#include <algorithm>
#include <array>

namespace emulator {
namespace {

bool covers(const std::vector<Epoch>& a, const std::vector<Epoch>& b) {
  for (size_t i = 0; i < b.size(); ++i) {
    if (a[i] < b[i]) return false;
  }
  return true;
}

Ref<Chunk> join_chunks(const Ref<Chunk>& a, const Ref<Chunk>& b) {
  if (a == b || covers(a->epochs, b->epochs)) return a;
  if (covers(b->epochs, a->epochs)) return b;
  Ref<Chunk> both(new Chunk);
  both->epochs = a->epochs;
  for (size_t i = 0; i < b->epochs.size(); ++i) both->epochs[i] = std::max(both->epochs[i], b->epochs[i]);
  return both;
}

Ref<Clock> join_clocks(const Ref<Clock>& a, const Ref<Clock>& b) {
  Ref<Clock> both(new Clock);
  bool is_a = true, is_b = true;
  auto x = a->entries.begin(), y = b->entries.begin();
  while (x != a->entries.end() || y != b->entries.end()) {
    if (y == b->entries.end() || (x != a->entries.end() && x->cluster < y->cluster)) {
      both->entries.push_back(*x++);
      is_b = false;
    } else if (x == a->entries.end() || y->cluster < x->cluster) {
      both->entries.push_back(*y++);
      is_a = false;
    } else {
      both->entries.push_back({x->cluster, join_chunks(x->chunk, y->chunk)});
      is_a = is_a && both->entries.back().chunk == x->chunk;
      is_b = is_b && both->entries.back().chunk == y->chunk;
      ++x, ++y;
    }
  }
  return is_a ? a : is_b ? b : both;
}

}  // namespace

Ref<Clock> join(const Ref<Clock>& a, const Ref<Clock>& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  // Threads that hold the same clock and acquire the same one must come to hold the same one again.
  struct Known {
    Ref<Clock> a, b, both;
  };
  static std::array<Known, 8> recent;
  static size_t oldest = 0;
  for (const Known& known : recent) {
    if (known.a == a && known.b == b) return known.both;
  }
  recent[oldest] = {a, b, join_clocks(a, b)};
  const Ref<Clock> both = recent[oldest].both;
  oldest = (oldest + 1) % recent.size();
  return both;
}

void ClockBuilder::join(const Ref<Clock>& clock) {
  if (!clock || clock == last_joined_) return;
  last_joined_ = clock;
  const Ref<Clock> both = emulator::join(clock_, clock);
  if (both == clock_) return;
  clock_ = both;
  owned_ = false;
  owned_chunk_ = -1;
}

void ClockBuilder::raise(uint32_t cluster, uint32_t agents, uint32_t agent, Epoch epoch) {
  if (epoch_in(clock_, cluster, agent) >= epoch) return;
  if (!owned_) {
    Ref<Clock> copy(new Clock);
    if (clock_) copy->entries = clock_->entries;
    clock_ = copy;
    owned_ = true;
    owned_chunk_ = -1;
  }
  auto& entries = clock_->entries;
  if (owned_chunk_ < 0 || entries[owned_chunk_].cluster != cluster) {
    auto place = std::lower_bound(entries.begin(), entries.end(), cluster,
                                  [](const Clock::Entry& entry, uint32_t id) { return entry.cluster < id; });
    Ref<Chunk> chunk(new Chunk);
    if (place == entries.end() || place->cluster != cluster) {
      chunk->epochs.resize(agents);
      place = entries.insert(place, {cluster, chunk});
    } else {
      chunk->epochs = place->chunk->epochs;
      place->chunk = chunk;
    }
    owned_chunk_ = static_cast<int>(place - entries.begin());
  }
  entries[owned_chunk_].chunk->epochs[agent] = epoch;
}

Ref<Clock> ClockBuilder::result() {
  owned_ = false;
  owned_chunk_ = -1;
  return clock_;
}

}  // namespace emulator
