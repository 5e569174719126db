// mbarriers and asynchronous copies: cp.async, bulk copies, st.async. Copies happen late, early, or at any time
// between.
#include <algorithm>
#include <cstring>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr int64_t kMaxPendingBytes = (1 << 20) - 1;

bool same(const Access& a, const Access& b) {
  return a.cluster == b.cluster && a.agent == b.agent && a.epoch == b.epoch;
}

// Ends the phase when nothing is pending: it publishes what the arriving threads knew and the copies that completed.
void complete_phase(Block& block, Mbarrier& mbarrier) {
  if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
  mbarrier.phase++;
  mbarrier.pending = mbarrier.count;
  machine.progress++;
  if (machine.config.check) {
    const Cluster& cluster = *block.cluster;
    mbarrier.generic.raise(cluster.id, cluster.agents, mbarrier.agent, mbarrier.phase);
    mbarrier.async.raise(cluster.id, cluster.agents, mbarrier.agent, mbarrier.phase);
    mbarrier.done = {mbarrier.generic.result(), mbarrier.async.result()};
  }
  for (Thread* thread : std::exchange(mbarrier.waiting, {})) {
    if ((mbarrier.phase & 1) != thread->wait_detail) {
      wake(thread);
    } else {
      mbarrier.waiting.push_back(thread);
    }
  }
}

void arrive(uint32_t address, uintptr_t pc) {
  Block& block = block_of(address, "mbarrier_arrive", pc);
  Mbarrier& mbarrier = require_mbarrier(block, offset_of(address), "mbarrier_arrive", pc);
  mbarrier.remote = mbarrier.remote || &block != current->block;
  if (mbarrier.pending == 0) fail("mbarrier_arrive: all arrivals of the phase have happened already", pc);
  mbarrier.pending--;
  if (machine.config.check) {
    add_to(mbarrier.generic, mbarrier.async, *current);
    current->epoch++;
  }
  complete_phase(block, mbarrier);
}

// The copy's writes to shared memory belong to the phase of the mbarrier in which it completes.
Actor completing_on(const Mbarrier& mbarrier, bool async) {
  return {current, mbarrier.agent, mbarrier.phase + 1, async};
}

}  // namespace

Mbarrier& require_mbarrier(Block& block, uint32_t address, const char* what, uintptr_t pc) {
  require_sm90(what, pc);
  require_shared(block, address, 8, 8, what, pc);
  for (const auto& mbarrier : block.mbarriers) {
    if (mbarrier->address != address) continue;
    if (machine.config.check) {
      const Access& last = block.cells[(address - kSharedBegin) / 2].write;
      if (!same(last, mbarrier->init)) fail(std::string(what) + ": the mbarrier was overwritten", pc);
      if (!ordered(last, *current)) {
        fail(std::string("race: ") + what + " is not ordered after the mbarrier's initialisation by " +
                 name_of(*block.cluster, last.agent),
             pc);
      }
    }
    return *mbarrier;
  }
  fail(format("%s: there is no mbarrier at shared +0x%x", what, address - kSharedBegin), pc);
}

void mbarrier_init(uint32_t address, uint32_t count) {
  const uintptr_t pc = EMULATOR_CALLER;
  Block& block = *current->block;
  require_sm90("mbarrier_init", pc);
  require_shared(block, address, 8, 8, "mbarrier_init", pc);
  for (const auto& mbarrier : block.mbarriers) {
    if (mbarrier->address == address) fail("mbarrier_init: the mbarrier is initialised already", pc);
  }
  if (count == 0 || count >= 1u << 20) fail(format("mbarrier_init: %u arrivals are not in [1, 2^20)", count), pc);
  if (block.mbarriers.size() == kMaxMbarriers) fail("mbarrier_init: the emulator knows 64 mbarriers per block", pc);
  check_shared(block, address, 8, self_actor(*current), AccessKind::kWrite, pc);
  auto mbarrier = std::make_unique<Mbarrier>();
  mbarrier->address = address;
  mbarrier->count = mbarrier->pending = count;
  mbarrier->phase = 0;
  mbarrier->bytes = 0;
  mbarrier->agent = mbarrier_agent(block, block.mbarriers.size());
  mbarrier->init = {block.cluster->id, current->epoch, 0, static_cast<uint16_t>(current->agent), 0};
  block.mbarriers.push_back(std::move(mbarrier));
}

void mbarrier_invalidate(uint32_t address) {
  const uintptr_t pc = EMULATOR_CALLER;
  Block& block = *current->block;
  Mbarrier& mbarrier = require_mbarrier(block, address, "mbarrier_invalidate", pc);
  if (!mbarrier.waiting.empty() || mbarrier.bytes != 0) fail("mbarrier_invalidate: the mbarrier is in use", pc);
  check_shared(block, address, 8, self_actor(*current), AccessKind::kWrite, pc);
  mbarrier.address = 0;  // its agent's clock stays
}

void mbarrier_arrive(uint32_t address) { arrive(address, EMULATOR_CALLER); }

void mbarrier_expect(uint32_t address, uint32_t bytes) {
  const uintptr_t pc = EMULATOR_CALLER;
  Mbarrier& mbarrier = require_mbarrier(*current->block, address, "mbarrier_expect_tx", pc);
  mbarrier.bytes += bytes;
  if (mbarrier.bytes > kMaxPendingBytes) fail("mbarrier_expect_tx: more than 2^20 - 1 bytes are pending", pc);
  complete_phase(*current->block, mbarrier);
}

bool mbarrier_wait(uint32_t address, uint32_t parity, bool blocking, bool cluster) {
  const uintptr_t pc = EMULATOR_CALLER;
  Mbarrier& mbarrier = require_mbarrier(*current->block, address, "mbarrier_wait", pc);
  if (parity > 1) fail(format("mbarrier_wait: the parity must be 0 or 1, got %u", parity), pc);
  if ((mbarrier.phase & 1) == parity && !blocking) {
    poll(address, pc);
    return false;
  }
  while ((mbarrier.phase & 1) == parity) {
    mbarrier.waiting.push_back(current);
    wait_for(Wait::kMbarrier, address, parity, pc);
  }
  if (mbarrier.remote && !cluster) {
    report(pc, 0,
           "mbarrier_wait for what other blocks did: it takes mbarrier_wait_cluster\n    by " + name_of(*current) +
               place(pc));
  }
  current->known.join(mbarrier.done);
  return true;
}

void complete_bytes(Block& block, Mbarrier& mbarrier, uint32_t bytes) {
  mbarrier.bytes -= bytes;
  complete_phase(block, mbarrier);
}

void enqueue(AsyncOperation operation) {
  machine.async.push_back(std::move(operation));
  if (machine.config.asynchrony == Config::kEarly) run_async(machine.async.size() - 1);
}

void run_async(size_t i) {
  const AsyncOperation operation = machine.async[i];
  machine.async.erase(machine.async.begin() + static_cast<int64_t>(i));
  machine.progress++;
  char* shared = operation.block->arena + operation.shared;
  switch (operation.kind) {
    case AsyncOperation::kLoad:
      memcpy(shared, reinterpret_cast<const void*>(operation.global), operation.bytes);
      break;
    case AsyncOperation::kStore:
      memcpy(reinterpret_cast<void*>(operation.global), shared, operation.bytes);
      break;
    case AsyncOperation::kRemoteStore:
      memcpy(shared, operation.value, operation.bytes);
      break;
    case AsyncOperation::kTensorLoad:
    case AsyncOperation::kTensorStore:
      copy_box(operation);
      break;
  }
  if (operation.mbarrier != nullptr) complete_bytes(*operation.block, *operation.mbarrier, operation.bytes);
}

void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  const uintptr_t pc = EMULATOR_CALLER;
  Block& block = *current->block;
  const uintptr_t global = reinterpret_cast<uintptr_t>(source);
  if (bytes % 16 != 0 || bytes == 0) fail(format("bulk_load: %u bytes are not a multiple of 16", bytes), pc);
  char* shared = require_shared(block, destination, bytes, 16, "bulk_load", pc);
  require_global(global, bytes, 16, "bulk_load", pc);
  Mbarrier& mbarrier = require_mbarrier(block, barrier, "bulk_load", pc);
  const Actor actor = completing_on(mbarrier, true);
  check_shared(block, barrier, 8, {current, current->agent, current->epoch, true}, AccessKind::kAtomicRead, pc);
  check_shared(block, destination, bytes, actor, AccessKind::kWrite, pc);
  check_global(global, bytes, actor, AccessKind::kRead, pc);
  memset(shared, 0xff, bytes);
  enqueue({.thread = current,
           .block = &block,
           .kind = AsyncOperation::kLoad,
           .shared = destination,
           .bytes = bytes,
           .global = global,
           .mbarrier = &mbarrier,
           .value = {},
           .map = {},
           .coordinates = {}});
}

void bulk_store(void* destination, uint32_t source, uint32_t bytes) {
  const uintptr_t pc = EMULATOR_CALLER;
  Thread& self = *current;
  Block& block = *self.block;
  const uintptr_t global = reinterpret_cast<uintptr_t>(destination);
  if (bytes % 16 != 0 || bytes == 0) fail(format("bulk_store: %u bytes are not a multiple of 16", bytes), pc);
  require_sm90("bulk_store", pc);
  require_shared(block, source, bytes, 16, "bulk_store", pc);
  require_global(global, bytes, 16, "bulk_store", pc);
  const Epoch epoch = block.stores[self.number / 32] + 1;
  check_shared(block, source, bytes, {&self, store_agent(self), epoch, true}, AccessKind::kRead, pc);
  check_global(global, bytes, {&self, store_agent(self) + kMaxWarps, epoch, true}, AccessKind::kWrite, pc);
  self.store_open = true;
  enqueue({.thread = &self,
           .block = &block,
           .kind = AsyncOperation::kStore,
           .shared = source,
           .bytes = bytes,
           .global = global,
           .mbarrier = nullptr,
           .value = {},
           .map = {},
           .coordinates = {}});
}

void bulk_commit() {
  Thread& self = *current;
  self.store_groups.push_back(++self.block->stores[self.number / 32]);
  self.store_open = false;
}

void bulk_wait(int pending, bool read) {
  Thread& self = *current;
  auto& groups = self.store_groups;
  if (groups.size() <= static_cast<size_t>(pending)) return;
  const Epoch done = groups[groups.size() - 1 - pending];
  // Which operations belong to the groups is not kept: all of this thread's happen now, and the later ones' cells still
  // say that they may not be touched.
  for (size_t i = 0; i < machine.async.size();) {
    const AsyncOperation& operation = machine.async[i];
    if (operation.thread == &self && operation.mbarrier == nullptr) {
      run_async(i);
    } else {
      ++i;
    }
  }
  groups.erase(groups.begin(), groups.end() - pending);
  if (!machine.config.check) return;
  const Cluster& cluster = *self.block->cluster;
  ClockBuilder clock;
  clock.raise(cluster.id, cluster.agents, store_agent(self), done);
  if (!read) clock.raise(cluster.id, cluster.agents, store_agent(self) + kMaxWarps, done);
  self.known.join({clock.result(), clock.result()});
}

void store_async(uint32_t destination, const void* value, uint32_t bytes, uint32_t barrier) {
  const uintptr_t pc = EMULATOR_CALLER;
  Block& block = block_of(destination, "store_async", pc);
  if (&block_of(barrier, "store_async", pc) != &block) fail("store_async: value and mbarrier are in two blocks", pc);
  const uint32_t shared = offset_of(destination);
  require_shared(block, shared, bytes, bytes, "store_async", pc);
  Mbarrier& mbarrier = require_mbarrier(block, offset_of(barrier), "store_async", pc);
  mbarrier.remote = mbarrier.remote || &block != current->block;
  check_shared(block, shared, bytes, completing_on(mbarrier, false), AccessKind::kWrite, pc);
  AsyncOperation operation{.thread = current,
                           .block = &block,
                           .kind = AsyncOperation::kRemoteStore,
                           .shared = shared,
                           .bytes = bytes,
                           .global = 0,
                           .mbarrier = &mbarrier,
                           .value = {},
                           .map = {},
                           .coordinates = {}};
  memcpy(operation.value, value, bytes);
  enqueue(std::move(operation));
}

void copy_async(uint32_t destination, const void* source, int bytes, int source_bytes) {
  const uintptr_t pc = EMULATOR_CALLER;
  Thread& self = *current;
  if (source_bytes < 0 || source_bytes > bytes) fail(format("cp_async: source size %d", source_bytes), pc);
  char* shared = require_shared(*self.block, destination, bytes, bytes, "cp_async", pc);
  if (source_bytes > 0) {
    require_global(reinterpret_cast<uintptr_t>(source), source_bytes, 1, "cp_async", pc);
    if (reinterpret_cast<uintptr_t>(source) % bytes != 0) fail("misaligned: source of cp_async", pc);
    check_global(reinterpret_cast<uintptr_t>(source), source_bytes, self_actor(self), AccessKind::kRead, pc);
  }
  check_shared(*self.block, destination, bytes, self_actor(self), AccessKind::kWrite, pc, Access::kInFlight);
  memset(shared, 0xff, bytes);
  self.copies.push_back({destination, source, bytes, source_bytes, self.copy_group});
}

void copy_async_commit() { current->copy_group++; }

void copy_async_wait(int pending) {
  const uintptr_t pc = EMULATOR_CALLER;
  Thread& self = *current;
  for (const CopyAsync& copy : std::exchange(self.copies, {})) {
    if (copy.group >= self.copy_group - pending) {
      self.copies.push_back(copy);
      continue;
    }
    char* shared = self.block->arena + copy.destination;
    memcpy(shared, copy.source, copy.source_bytes);
    memset(shared + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    if (!machine.config.check) continue;
    for (int i = 0; i < copy.bytes; i += 2) {
      self.block->cells[(copy.destination - kSharedBegin + i) / 2].write.flags &= ~Access::kInFlight;
    }
    check_shared(*self.block, copy.destination, copy.bytes, self_actor(self), AccessKind::kWrite, pc);
  }
}

void exit_copies(Thread& thread) {
  if (!thread.copies.empty()) report(1, thread.number, name_of(thread) + " exits while its cp.async are under way");
  if (thread.store_open || !thread.store_groups.empty()) {
    report(2, thread.number, name_of(thread) + " exits while its bulk store may still read shared memory");
  }
  if (thread.block->live > 1) return;
  for (const AsyncOperation& operation : machine.async) {
    if (operation.block != thread.block || operation.mbarrier == nullptr) continue;
    report(3, 0, name_of(thread) + " is the last to exit, while copies to the block's shared memory are under way");
  }
}

}  // namespace emulator
