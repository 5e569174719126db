// Barriers of blocks and clusters, fences, and atomic operations: what orders the accesses of different threads.
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "emulator/machine.h"

namespace emulator {
namespace {

void release_barrier(Barrier& barrier) {
  if (machine.config.check) {
    const Knowledge all{barrier.generic.result(), barrier.async.result()};
    for (Thread* thread : barrier.waiting) thread->known.join(all);
  }
  machine.stats.barriers++;
  const std::vector<Thread*> waiting = std::move(barrier.waiting);
  barrier = Barrier();
  for (Thread* thread : waiting) {
    if (thread != current) wake(thread);
  }
}

void arrive_at(int id, int threads, bool sync, uintptr_t pc) {
  Thread& self = *current;
  Barrier& barrier = self.block->barriers[id];
  if (barrier.arrived == 0) {
    barrier.threads = threads;
  } else if (barrier.threads != threads) {
    fail(format("mismatch: barrier %d is used with %d and with %d threads", id, barrier.threads, threads), pc);
  }
  if (machine.config.check) {
    add_to(barrier.generic, barrier.async, self);
    self.epoch++;
  }
  if (sync) barrier.waiting.push_back(&self);
  barrier.arrived++;
  if (barrier.arrived == (threads > 0 ? threads : self.block->live)) {
    release_barrier(barrier);
  } else if (sync) {
    wait_for(Wait::kBarrier, id, 0, pc);
  }
}

void complete_cluster_phase(Cluster& cluster) {
  cluster.released = {cluster.generic.result(), cluster.async.result()};
  cluster.generic.clear();
  cluster.async.clear();
  cluster.arrived = 0;
  cluster.phase++;
  machine.progress++;
  for (const auto& block : cluster.blocks) {
    for (Thread& thread : block->threads) {
      if (thread.wait == Wait::kCluster) wake(&thread);
    }
  }
}

void arrive_at_cluster(uintptr_t pc) {
  Thread& self = *current;
  Cluster& cluster = *self.block->cluster;
  require_sm90("cluster_arrive", pc);
  if (self.cluster_arrived) fail("mismatch: cluster_arrive twice without cluster_wait", pc);
  self.cluster_arrived = true;
  self.cluster_phase = cluster.phase;
  if (machine.config.check) {
    add_to(cluster.generic, cluster.async, self);
    self.epoch++;
  }
  if (++cluster.arrived == cluster.live) complete_cluster_phase(cluster);
}

// What was published by atomic operations and release stores, by address.
std::unordered_map<uintptr_t, Knowledge> published;

Knowledge& published_at(const void* address) { return published[reinterpret_cast<uintptr_t>(address)]; }

void require_word(const void* pointer, uint32_t bytes, AccessKind kind, const char* what, uintptr_t pc) {
  Thread& self = *current;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(self.block->arena);
  if (machine.config.schedule == Config::kRandom && machine.random() % 4 == 0) yield();
  if (offset < kArenaBytes) {
    require_shared(*self.block, static_cast<uint32_t>(offset), bytes, bytes, what, pc);
    check_shared(*self.block, static_cast<uint32_t>(offset), bytes, self_actor(self), kind, pc);
  } else {
    require_global(address, bytes, bytes, what, pc);
    check_global(address, bytes, self_actor(self), kind, pc);
  }
  if (kind == AccessKind::kAtomic) machine.progress++;
}

template <typename T>
T apply(AtomicOp op, T old, T operand, T compare) {
  switch (op) {
    case AtomicOp::kAdd:
      return old + operand;
    case AtomicOp::kMin:
      return std::min(old, operand);
    case AtomicOp::kMax:
      return std::max(old, operand);
    case AtomicOp::kExchange:
      return operand;
    case AtomicOp::kCompareExchange:
      return old == compare ? operand : old;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (op == AtomicOp::kAnd) return old & operand;
    if (op == AtomicOp::kOr) return old | operand;
    if (op == AtomicOp::kXor) return old ^ operand;
  }
  return old;
}

template <typename T>
uint64_t apply_at(AtomicOp op, void* address, uint64_t operand_bits, uint64_t compare_bits) {
  T old, operand, compare;
  memcpy(&old, address, sizeof(T));
  memcpy(&operand, &operand_bits, sizeof(T));
  memcpy(&compare, &compare_bits, sizeof(T));
  const T next = apply(op, old, operand, compare);
  memcpy(address, &next, sizeof(T));
  uint64_t result = 0;
  memcpy(&result, &old, sizeof(T));
  return result;
}

}  // namespace

void add_to(ClockBuilder& generic, ClockBuilder& async, const Thread& thread) {
  const Cluster& cluster = *thread.block->cluster;
  generic.join(thread.known.generic);
  generic.raise(cluster.id, cluster.agents, thread.agent, thread.epoch);
  async.join(thread.known.async);
  async.raise(cluster.id, cluster.agents, thread.agent, thread.epoch_async);
}

Knowledge snapshot(const Thread& thread) {
  ClockBuilder generic, async;
  add_to(generic, async, thread);
  return {generic.result(), async.result()};
}

void begin_synchronisation() { published.clear(); }

void barrier_sync_all() { arrive_at(0, 0, true, EMULATOR_CALLER); }

void barrier(int id, int threads, bool sync) {
  const uintptr_t pc = EMULATOR_CALLER;
  if (id < 0 || id > 15) fail(format("a named barrier's id must be in [0, 15], got %d", id), pc);
  if (threads <= 0 || threads % 32 != 0) {
    fail(format("a named barrier's number of threads must be a positive multiple of 32, got %d", threads), pc);
  }
  arrive_at(id, threads, sync, pc);
}

void exit_barriers(Thread& thread) {
  Block& block = *thread.block;
  for (Barrier& barrier : block.barriers) {
    if (barrier.threads == 0 && barrier.arrived > 0 && barrier.arrived == block.live) release_barrier(barrier);
  }
  Cluster& cluster = *block.cluster;
  if (thread.cluster_arrived && thread.cluster_phase == cluster.phase) cluster.arrived--;
  if (cluster.arrived > 0 && cluster.arrived == cluster.live) complete_cluster_phase(cluster);
}

uint32_t cluster_rank() {
  require_sm90("cluster_rank", EMULATOR_CALLER);
  return current->block->rank;
}

uint32_t cluster_size() {
  require_sm90("cluster_size", EMULATOR_CALLER);
  return machine.launch.cluster;
}

uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  const uintptr_t pc = EMULATOR_CALLER;
  require_sm90("map_to_rank", pc);
  if (rank >= machine.launch.cluster) {
    fail(format("map_to_rank: rank %u in a cluster of %u blocks", rank, machine.launch.cluster), pc);
  }
  return offset_of(address) | (rank + 1) << kRankShift;
}

uint32_t load_remote(uint32_t address) {
  const uintptr_t pc = EMULATOR_CALLER;
  Block& block = block_of(address, "load_remote", pc);
  const char* bytes = require_shared(block, offset_of(address), 4, 4, "load_remote", pc);
  check_shared(block, offset_of(address), 4, self_actor(*current), AccessKind::kRead, pc);
  uint32_t value;
  memcpy(&value, bytes, sizeof(value));
  return value;
}

void cluster_arrive() { arrive_at_cluster(EMULATOR_CALLER); }

void cluster_wait() {
  Thread& self = *current;
  Cluster& cluster = *self.block->cluster;
  const uintptr_t pc = EMULATOR_CALLER;
  if (!self.cluster_arrived) fail("mismatch: cluster_wait without cluster_arrive", pc);
  while (self.cluster_phase == cluster.phase) wait_for(Wait::kCluster, 0, 0, pc);
  self.cluster_arrived = false;
  self.known.join(cluster.released);
}

void fence_proxy_async() {
  Thread& self = *current;
  require_sm90("fence_proxy_async", EMULATOR_CALLER);
  self.known.async = join(self.known.async, self.known.generic);
  self.epoch_async = self.epoch++;
}

void fence_mbarrier_init() { fence_proxy_async(); }

void grid_dependency_wait() {
  ClockBuilder done;
  done.raise(machine.previous_done, 1, 0, 1);
  current->known.join({done.result(), done.result()});
}

void thread_fence() {
  Thread& self = *current;
  if (!machine.config.check) return;
  self.known.join(self.observed);
  self.fenced = snapshot(self);
  self.has_fenced = true;
  self.epoch++;
}

uint64_t atomic(AtomicOp op, AtomicType type, void* address, uint64_t operand, uint64_t compare) {
  const uint32_t bytes = type == AtomicType::kUnsigned64 ? 8 : 4;
  require_word(address, bytes, AccessKind::kAtomic, "an atomic operation", EMULATOR_CALLER);
  Thread& self = *current;
  if (machine.config.check) {
    Knowledge& word = published_at(address);
    (machine.config.strict_acquire ? self.observed : self.known).join(word);
    if (self.has_fenced) word.join(self.fenced);
  }
  switch (type) {
    case AtomicType::kUnsigned32:
      return apply_at<uint32_t>(op, address, operand, compare);
    case AtomicType::kSigned32:
      return apply_at<int32_t>(op, address, operand, compare);
    case AtomicType::kUnsigned64:
      return apply_at<uint64_t>(op, address, operand, compare);
    default:
      return apply_at<float>(op, address, operand, compare);
  }
}

uint32_t load_acquire(const uint32_t* address) {
  const uintptr_t pc = EMULATOR_CALLER;
  Thread& self = *current;
  require_word(address, 4, AccessKind::kAtomicRead, "load_acquire", pc);
  if (self.polled == address && self.polled_value == *address) poll(reinterpret_cast<uintptr_t>(address), pc);
  self.polled = address;
  self.polled_value = *address;
  if (machine.config.check) self.known.join(published_at(address));
  return self.polled_value;
}

void store_release(uint32_t* address, uint32_t value) {
  require_word(address, 4, AccessKind::kAtomic, "store_release", EMULATOR_CALLER);
  if (machine.config.check) published_at(address).join(snapshot(*current));
  current->epoch++;
  *address = value;
}

uint32_t add_acquire_release(uint32_t* address, uint32_t value) {
  require_word(address, 4, AccessKind::kAtomic, "add_acquire_release", EMULATOR_CALLER);
  if (machine.config.check) {
    Knowledge& word = published_at(address);
    current->known.join(word);
    word.join(snapshot(*current));
  }
  current->epoch++;
  const uint32_t old = *address;
  *address = old + value;
  return old;
}

}  // namespace emulator
