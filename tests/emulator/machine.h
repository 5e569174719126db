// The state of the emulated machine while a kernel runs: threads, blocks, clusters, and who accessed which memory last.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "emulator/calls.h"
#include "emulator/clock.h"

#define EMULATOR_CALLER (reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - 1)

namespace emulator {

constexpr uint32_t kSharedBegin = 1024;  // shared address 0 is never valid, as on the GPU
constexpr uint32_t kSharedBytes = 227 << 10;
constexpr uint32_t kArenaBytes = kSharedBegin + kSharedBytes + (16 << 10);
constexpr int kRankShift = 24;  // of a shared::cluster address; rank + 1 stands there, 0 is the own block
constexpr int kMaxMbarriers = 64;
constexpr int kMaxWarps = 32;
constexpr int kMaxWarpgroups = 8;
constexpr int kMaxThreads = 1024;

struct Config {
  enum Schedule { kFifo, kLifo, kRandom } schedule = kFifo;
  enum Asynchrony { kLate, kEarly, kMixed } asynchrony = kLate;
  uint64_t seed = 1;
  int jitter = 0;  // one plain access in `jitter` gives way to another thread
  bool check = true;
  bool strict_acquire = false;  // an atomic operation acquires only together with a __threadfence() after it
  int capability = 90;
  int multiprocessors = 4;
  int largest_cluster = 16;
};

// The last access of some kind to a few bytes.
struct Access {
  enum Flag : uint16_t { kAtomic = 1, kAsync = 2, kInFlight = 4 };
  uint32_t cluster = 0;  // 0: none
  Epoch epoch = 0;
  uint32_t pc = 0;
  uint16_t agent = 0;
  uint16_t flags = 0;
};

struct Cell {
  Access write;
  Access atomic;  // the last atomic operation since
  Access reads[2];
};

struct Block;
struct Cluster;

enum class Wait { kNone, kBarrier, kWarp, kMbarrier, kCluster, kGroupMultiply, kPoll };

struct CopyAsync {
  uint32_t destination;
  const void* source;
  int bytes, source_bytes, group;
};

// A wgmma accumulator that is out of the thread's hands until its group has been waited for.
struct Accumulator {
  float* registers;
  std::vector<float> values;
};

struct Thread {
  void* stack_pointer;
  char* stack;
  Block* block;
  uint32_t number;  // in the block
  uint32_t agent;   // in the cluster's clocks
  uint3 index;
  bool exited = false;

  Wait wait = Wait::kNone;
  uint64_t wait_on = 0;  // barrier id, warp operation, mbarrier address
  uint64_t wait_detail = 0;
  uintptr_t pc = 0;  // of the wait
  uint64_t polled_progress = 0;

  // The operands of the warp collective in which the thread takes part, and its result.
  uint64_t value = 0;
  int argument = 0, width = 0;
  const void* operands[3] = {};
  uint64_t result = 0;

  Knowledge known;
  Epoch epoch = 1, epoch_async = 0;
  Knowledge fenced;  // what __threadfence() made ready for the next atomic operation to publish
  bool has_fenced = false;
  Knowledge observed;  // what atomic operations saw published; an acquire fence would make it known

  std::vector<CopyAsync> copies;
  int copy_group = 0;
  std::vector<Epoch> store_groups;  // committed bulk stores that may still read shared memory
  bool store_open = false;          // bulk stores issued since the last commit
  bool cluster_arrived = false;
  uint32_t cluster_phase = 0;
  const void* polled = nullptr;
  uint32_t polled_value = 0;

  std::vector<Accumulator> accumulators;
  int multiplies = 0, multiply_groups = 0;
  bool multiply_fenced = false;
};

struct Collective {
  bool live = false;
  WarpOp op;
  uint32_t mask, arrived;
  uintptr_t pc;
};

struct Barrier {
  int threads = -1, arrived = 0;
  std::vector<Thread*> waiting;
  ClockBuilder generic, async;
};

struct Mbarrier {
  uint32_t address, count, pending, phase, agent;
  int64_t bytes;
  bool remote = false;  // other blocks arrive at it or store to it
  Access init;
  ClockBuilder generic, async;  // of the phases so far, the current one included
  Knowledge done;               // of the completed phases
  std::vector<Thread*> waiting;
};

struct GroupMultiply;
struct Warpgroup {
  std::deque<std::shared_ptr<GroupMultiply>> pending;
  int retired = 0, waiting = 0, wait_for = 0;
  Epoch issued = 0, retired_epoch = 0;
};

struct Block {
  Cluster* cluster;
  uint32_t rank;   // in the cluster
  uint32_t agent;  // its first one
  uint3 index;
  int live = 0;
  char* arena;  // addressed by shared addresses
  std::vector<Cell> cells;
  ClockBuilder exited_generic, exited_async;  // what its threads knew when they exited
  std::vector<Thread> threads;
  std::vector<uint32_t> alive;  // lanes, by warp
  std::vector<std::vector<Collective>> collectives;
  Barrier barriers[16];
  std::vector<std::unique_ptr<Mbarrier>> mbarriers;
  Warpgroup warpgroups[kMaxWarpgroups];
  Epoch stores[kMaxWarps] = {};  // committed groups of bulk stores, by warp
};

struct Cluster {
  uint32_t id;
  uint32_t agents;
  int live = 0, arrived = 0;
  uint32_t phase = 0;
  ClockBuilder generic, async;
  Knowledge released;  // by the last completed phase of the cluster's barrier
  std::vector<std::unique_ptr<Block>> blocks;
};

// Agents of a block: its threads, its mbarriers (copies that complete on them), the warps' bulk stores (reads of shared
// memory, then writes of global memory), the warpgroups' multiplications.
inline uint32_t mbarrier_agent(const Block& block, size_t i) { return block.agent + block.threads.size() + i; }
inline uint32_t store_agent(const Thread& thread) {
  return mbarrier_agent(*thread.block, kMaxMbarriers) + thread.number / 32;
}
inline uint32_t warpgroup_agent(const Block& block, int warpgroup) {
  return mbarrier_agent(block, kMaxMbarriers) + 2 * kMaxWarps + warpgroup;
}
constexpr uint32_t kExtraAgents = kMaxMbarriers + 2 * kMaxWarps + kMaxWarpgroups;

struct AsyncOperation {
  Thread* thread;
  Block* block;  // of the shared memory
  enum Kind { kLoad, kStore, kTensorLoad, kTensorStore, kRemoteStore } kind;
  uint32_t shared, bytes;
  uintptr_t global;
  Mbarrier* mbarrier;
  char value[16];
  std::shared_ptr<CUtensorMap> map;
  int coordinates[5];
};

struct Stats {
  uint64_t launches, blocks, switches, accesses, collectives, barriers;
};

struct Machine {
  Config config;
  Launch launch;
  Stats stats{};
  void (*body)(void*);
  void* context;
  size_t context_bytes;
  uintptr_t code;  // accesses keep the low half of pc - code

  uint32_t next_cluster_id = 1;
  uint32_t first_cluster_id = 1;     // of this launch
  uint32_t previous_cluster_id = 1;  // first one of the launch before, when this one may have begun before its end
  uint32_t previous_done = 0;        // the agent-less cluster id whose knowledge grid_dependency_wait() brings
  std::vector<std::unique_ptr<Cluster>> resident;
  std::deque<Thread*> ready;
  std::vector<Thread*> pollers;
  std::vector<AsyncOperation> async;
  uint64_t progress = 0;
  int idle_polls = 0;  // since the last progress
  uint64_t random_state = 1;
  std::vector<uint32_t> order;  // in which the grid's clusters start
  size_t at_once = 1;           // clusters that run at the same time even if no thread polls
  bool finished_cluster = false;
  bool failed = false;
  void* main_stack = nullptr;

  uint32_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<uint32_t>(random_state >> 20);
  }
};

extern Machine machine;
extern __thread Thread* current __attribute__((tls_model("initial-exec")));

// scheduler.cpp
void suspend();  // runs other threads until the current one is woken
void wait_for(Wait kind, uint64_t on, uint64_t detail, uintptr_t pc);
void wake(Thread* thread);
void yield();
void poll(uint64_t on, uintptr_t pc);  // until something has changed

// report.cpp
void begin_reports();
std::string reports();
bool is_new(uintptr_t first, uintptr_t second);  // no such pair of places was reported
void report(uintptr_t first, uintptr_t second, const std::string& text);
[[noreturn]] void fail(const std::string& text, uintptr_t pc);
void report_deadlock();
void require_sm90(const char* what, uintptr_t pc);  // on an older GPU the instruction is a trap
std::string place(uintptr_t pc);
std::string line(uintptr_t pc);  // the innermost one
std::string name_of(const Cluster& cluster, uint32_t agent);
std::string name_of(const Thread& thread);
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// memory.cpp. Whose access it is, and whose knowledge decides what came before.
struct Actor {
  const Thread* thread;
  uint32_t agent;
  Epoch epoch;
  bool async;
};
inline Actor self_actor(const Thread& thread) { return {&thread, thread.agent, thread.epoch, false}; }
enum class AccessKind { kRead, kWrite, kAtomic, kAtomicRead };
bool ordered(const Access& access, const Thread& thread);
void check_shared(Block& block, uint32_t address, uint32_t bytes, const Actor& actor, AccessKind kind, uintptr_t pc,
                  uint16_t flags = 0);
void check_global(uintptr_t address, uint32_t bytes, const Actor& actor, AccessKind kind, uintptr_t pc);
char* require_shared(Block& block, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what,
                     uintptr_t pc);
void require_global(uintptr_t address, uint32_t bytes, uint32_t alignment, const char* what, uintptr_t pc);
Block& block_of(uint32_t cluster_address, const char* what, uintptr_t pc);
inline uint32_t offset_of(uint32_t cluster_address) { return cluster_address & ((1u << kRankShift) - 1); }
void begin_memory(bool keep);  // of a launch
// When the last thread of a block exits: other blocks of the cluster must be done with its shared memory by then.
void check_exit(Block& block);

// barriers.cpp, warp.cpp, copies.cpp, group_multiply.cpp, tensor_map.cpp
void begin_synchronisation();
Knowledge snapshot(const Thread& thread);
void add_to(ClockBuilder& generic, ClockBuilder& async, const Thread& thread);
void exit_barriers(Thread& thread);
void exit_warp(Thread& thread);
void exit_copies(Thread& thread);
void exit_multiplies(Thread& thread);
Mbarrier& require_mbarrier(Block& block, uint32_t address, const char* what, uintptr_t pc);
void complete_bytes(Block& block, Mbarrier& mbarrier, uint32_t bytes);
void enqueue(AsyncOperation operation);
void run_async(size_t i);
void copy_box(const AsyncOperation& operation);

}  // namespace emulator
