// Vector clocks: what happens before what. A clock says of every thread (and asynchronous agent) of every cluster up to
// which epoch its work is known to have happened. Clocks are immutable and shared: after a barrier all threads of a
// block hold the same one, so that a barrier of T threads costs O(T), not O(T^2).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace emulator {

using Epoch = uint32_t;

// Counted by hand: the emulator runs on one thread at a time, and std::shared_ptr would pay for atomic operations.
template <typename T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(T* object) : object_(object) { object_->references++; }
  Ref(const Ref& other) : object_(other.object_) {
    if (object_ != nullptr) object_->references++;
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() {
    if (object_ != nullptr && --object_->references == 0) delete object_;
  }
  T* get() const { return object_; }
  T* operator->() const { return object_; }
  T& operator*() const { return *object_; }
  explicit operator bool() const { return object_ != nullptr; }
  bool operator==(const Ref&) const = default;

 private:
  T* object_ = nullptr;
};

// The epochs of one cluster's agents.
struct Chunk {
  int references = 0;
  std::vector<Epoch> epochs;
};

struct Clock {
  struct Entry {
    uint32_t cluster;
    Ref<Chunk> chunk;
  };
  int references = 0;
  std::vector<Entry> entries;  // by cluster, ascending

  Epoch at(uint32_t cluster, uint32_t agent) const {
    for (size_t i = entries.size(); i-- > 0 && entries[i].cluster >= cluster;) {
      if (entries[i].cluster == cluster) return entries[i].chunk->epochs[agent];
    }
    return 0;
  }
};

inline Epoch epoch_in(const Ref<Clock>& clock, uint32_t cluster, uint32_t agent) {
  return clock ? clock->at(cluster, agent) : 0;
}

// The least clock that knows what both know; one of the two when it knows everything.
Ref<Clock> join(const Ref<Clock>& a, const Ref<Clock>& b);

// Gathers what many agents know.
class ClockBuilder {
 public:
  void join(const Ref<Clock>& clock);
  // `agents` is the number of agents of that cluster.
  void raise(uint32_t cluster, uint32_t agents, uint32_t agent, Epoch epoch);
  Ref<Clock> result();
  void clear() { *this = ClockBuilder(); }

 private:
  Ref<Clock> clock_;
  Ref<Clock> last_joined_;  // barriers join the same clock once per thread
  bool owned_ = false;      // nobody else holds clock_
  int owned_chunk_ = -1;    // the entry whose chunk nobody else holds
};

// What an agent knows of generic accesses, and which of them are also ordered before its asynchronous operations.
struct Knowledge {
  Ref<Clock> generic;
  Ref<Clock> async;

  void join(const Knowledge& other) {
    generic = emulator::join(generic, other.generic);
    async = emulator::join(async, other.async);
  }
};

}  // namespace emulator
