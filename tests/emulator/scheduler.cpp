// Runs a grid: clusters one after another (several at a time when threads poll global memory), threads as fibers.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>

#include "emulator/fiber.h"
#include "emulator/machine.h"

namespace emulator {

Machine machine;
__thread Thread* current = nullptr;

namespace {

constexpr size_t kMaxResident = 64;

std::vector<char*> free_arenas;

char* take_arena() {
  if (free_arenas.empty()) {
    void* arena =
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) throw std::bad_alloc();
    free_arenas.push_back(static_cast<char*>(arena));
  }
  char* arena = free_arenas.back();
  free_arenas.pop_back();
  return arena;
}

void run_thread() {
  machine.body(machine.context);
  Thread& self = *current;
  self.exited = true;
  machine.progress++;
  exit_multiplies(self);
  exit_copies(self);
  if (machine.launch.cluster > 1 && machine.config.check) {
    add_to(self.block->exited_generic, self.block->exited_async, self);
    if (self.block->live == 1) check_exit(*self.block);
  }
  self.block->live--;
  self.block->cluster->live--;
  self.block->alive[self.number / 32] &= ~(1u << self.number % 32);
  exit_warp(self);
  exit_barriers(self);
  if (self.block->cluster->live == 0) machine.finished_cluster = true;
  suspend();
  __builtin_unreachable();
}

void start_thread(Thread& thread, Block& block, uint32_t number) {
  const dim3 shape = machine.launch.block;
  thread.stack = take_stack();
  thread.stack_pointer = prepare_stack(thread.stack, run_thread);
  thread.block = &block;
  thread.number = number;
  thread.agent = block.agent + number;
  thread.index = {number % shape.x, number / shape.x % shape.y, number / shape.x / shape.y};
  machine.ready.push_back(&thread);
}

void start_block(Cluster& cluster, uint32_t rank, uint32_t number) {
  cluster.blocks.push_back(std::make_unique<Block>());
  Block& block = *cluster.blocks.back();
  const dim3 grid = machine.launch.grid, shape = machine.launch.block;
  const uint32_t threads = shape.x * shape.y * shape.z, warps = (threads + 31) / 32;
  block.cluster = &cluster;
  block.rank = rank;
  block.agent = rank * (threads + kExtraAgents);
  block.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  block.live = static_cast<int>(threads);
  block.arena = take_arena();
  // All ones is NaN in every floating-point type.
  memset(block.arena, 0xff, std::min<size_t>(kArenaBytes, kSharedBegin + machine.launch.shared_bytes + 4096));
  if (machine.config.check) block.cells.resize((machine.launch.shared_bytes + 1) / 2);
  block.alive.assign(warps, ~0u);
  if (threads % 32 != 0) block.alive.back() = (1u << threads % 32) - 1;
  block.collectives.resize(warps);
  block.threads.resize(threads);
  for (uint32_t i = 0; i < threads; ++i) start_thread(block.threads[i], block, i);
  machine.stats.blocks++;
}

void start_cluster(uint32_t number) {
  machine.resident.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *machine.resident.back();
  const dim3 shape = machine.launch.block;
  const uint32_t threads = shape.x * shape.y * shape.z;
  cluster.id = machine.next_cluster_id++;
  cluster.agents = machine.launch.cluster * (threads + kExtraAgents);
  cluster.live = static_cast<int>(machine.launch.cluster * threads);
  for (uint32_t rank = 0; rank < machine.launch.cluster; ++rank) {
    start_block(cluster, rank, number * machine.launch.cluster + rank);
  }
  machine.progress++;
}

void release(Cluster& cluster) {
  for (const auto& block : cluster.blocks) {
    free_arenas.push_back(block->arena);
    for (const Thread& thread : block->threads) give_stack(thread.stack);
  }
}

// Copies may still be under way when the last thread of a cluster has exited.
void release_finished() {
  machine.finished_cluster = false;
  for (size_t c = machine.resident.size(); c-- > 0;) {
    Cluster& cluster = *machine.resident[c];
    if (cluster.live > 0) continue;
    for (size_t i = 0; i < machine.async.size();) {
      if (machine.async[i].block->cluster == &cluster) {
        run_async(i);
      } else {
        ++i;
      }
    }
    release(cluster);
    machine.resident.erase(machine.resident.begin() + static_cast<int64_t>(c));
  }
}

Thread* pick() {
  auto& ready = machine.ready;
  if (ready.empty()) return nullptr;
  Thread* next;
  if (machine.config.schedule == Config::kLifo) {
    next = ready.back();
    ready.pop_back();
    return next;
  }
  if (machine.config.schedule == Config::kRandom) std::swap(ready[machine.random() % ready.size()], ready.front());
  next = ready.front();
  ready.pop_front();
  return next;
}

bool wake_pollers() {
  bool any = false;
  for (Thread* thread : std::exchange(machine.pollers, {})) {
    if (thread->polled_progress != machine.progress) {
      wake(thread);
      machine.idle_polls = 0;
      any = true;
    } else {
      machine.pollers.push_back(thread);
    }
  }
  return any;
}

// CUDA promises no order of the blocks.
void choose_order(uint32_t clusters) {
  machine.order.resize(clusters);
  std::iota(machine.order.begin(), machine.order.end(), 0);
  machine.at_once = 1;
  if (machine.config.schedule == Config::kLifo) std::reverse(machine.order.begin(), machine.order.end());
  if (machine.config.schedule != Config::kRandom) return;
  for (uint32_t i = clusters; i > 1; --i) std::swap(machine.order[i - 1], machine.order[machine.random() % i]);
  machine.at_once = 1 + machine.random() % 4;
}

// Nothing is ready: lets asynchronous work happen, then pollers look again, then further clusters start.
void idle(uint32_t& next) {
  if (!machine.async.empty()) {
    run_async(machine.config.asynchrony == Config::kMixed ? machine.random() % machine.async.size() : 0);
    return;
  }
  if (wake_pollers()) return;
  const bool room = machine.resident.empty() || (!machine.pollers.empty() && machine.resident.size() < kMaxResident);
  if (next < machine.order.size() && room) return start_cluster(machine.order[next++]);
  // A thread that looks twice does not wait yet; one that looks again and again does.
  if (!machine.pollers.empty() && machine.idle_polls++ < 100) {
    for (Thread* thread : std::exchange(machine.pollers, {})) wake(thread);
    return;
  }
  report_deadlock();
}

std::string problem_of(const Launch& launch) {
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads == 0 || threads > kMaxThreads) return format("a block must have 1 to 1024 threads, got %zu", threads);
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) return "the grid is empty";
  if (launch.grid.y > 65535 || launch.grid.z > 65535) return "the grid's y and z must be below 65536";
  if (launch.shared_bytes > shared_bytes()) {
    return format("%zu bytes of shared memory are more than a block may have", launch.shared_bytes);
  }
  if (launch.cluster > 1 && machine.config.capability < 90) return "clusters need compute capability 9.0";
  if (launch.cluster < 1 || launch.cluster > 16 || (launch.cluster & (launch.cluster - 1)) != 0) {
    return format("a cluster must have 1, 2, 4, 8 or 16 blocks, got %u", launch.cluster);
  }
  if (launch.grid.x % launch.cluster != 0) {
    return format("the grid's x (%u) must be a multiple of the cluster's (%u)", launch.grid.x, launch.cluster);
  }
  return "";
}

void begin(const Launch& launch, void (*body)(void*), void* context, size_t context_bytes) {
  const bool programmatic = launch.programmatic && machine.config.capability >= 90;
  machine.launch = launch;
  machine.body = body;
  machine.context = context;
  machine.context_bytes = context_bytes;
  machine.failed = machine.finished_cluster = false;
  machine.random_state = (machine.config.seed + machine.stats.launches) * 0x9E3779B97F4A7C15ull | 1;
  machine.previous_cluster_id = machine.first_cluster_id;
  machine.previous_done = machine.next_cluster_id++;
  machine.first_cluster_id = machine.next_cluster_id;
  if (!programmatic) machine.previous_cluster_id = machine.first_cluster_id;
  machine.stats.launches++;
  begin_reports();
  begin_memory(programmatic);
  begin_synchronisation();
}

void run_grid() {
  const Launch& launch = machine.launch;
  const uint32_t clusters = launch.grid.x * launch.grid.y * launch.grid.z / launch.cluster;
  choose_order(clusters);
  uint32_t next = 0;
  while (!machine.failed && (next < clusters || !machine.resident.empty())) {
    while (next < clusters && machine.resident.size() < machine.at_once) start_cluster(machine.order[next++]);
    if (Thread* thread = pick()) {
      current = thread;
      emulator_switch_stack(&machine.main_stack, thread->stack_pointer);
      current = nullptr;
    } else {
      idle(next);
    }
    if (machine.finished_cluster && !machine.failed) release_finished();
  }
  for (const auto& cluster : machine.resident) release(*cluster);  // after a failure
  machine.resident.clear();
  machine.ready.clear();
  machine.pollers.clear();
  machine.async.clear();
}

}  // namespace

void suspend() {
  Thread* me = current;
  if (machine.config.asynchrony == Config::kMixed && !machine.async.empty() && machine.random() % 8 == 0) {
    run_async(machine.random() % machine.async.size());
  }
  Thread* next = machine.finished_cluster ? nullptr : pick();
  machine.stats.switches++;
  if (next == me) return;
  current = next;
  emulator_switch_stack(&me->stack_pointer, next != nullptr ? next->stack_pointer : machine.main_stack);
}

void wait_for(Wait kind, uint64_t on, uint64_t detail, uintptr_t pc) {
  Thread& self = *current;
  self.wait = kind;
  self.wait_on = on;
  self.wait_detail = detail;
  self.pc = pc;
  suspend();
}

void wake(Thread* thread) {
  thread->wait = Wait::kNone;
  machine.ready.push_back(thread);
}

void yield() {
  machine.ready.push_back(current);
  suspend();
}

void poll(uint64_t on, uintptr_t pc) {
  current->polled_progress = machine.progress;
  machine.pollers.push_back(current);
  wait_for(Wait::kPoll, on, 0, pc);
}

const char* run(const Launch& launch, void (*body)(void*), void* context, size_t context_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  thread_local std::string error;
  error = problem_of(launch);
  if (!error.empty()) return error.c_str();
  begin(launch, body, context, context_bytes);
  run_grid();
  error = reports();
  return error.empty() ? nullptr : error.c_str();
}

void trap() { fail("__trap()", EMULATOR_CALLER); }

int multiprocessors() { return machine.config.multiprocessors; }
int largest_cluster() { return machine.config.largest_cluster; }
int capability() { return machine.config.capability; }
size_t shared_bytes() {
  if (machine.config.capability >= 90) return kSharedBytes;
  return (machine.config.capability > 80 ? 99u : 163u) << 10;
}

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
uint3 block_shape() { return {machine.launch.block.x, machine.launch.block.y, machine.launch.block.z}; }
uint3 grid_shape() { return {machine.launch.grid.x, machine.launch.grid.y, machine.launch.grid.z}; }
void* shared_memory() { return current->block->arena + kSharedBegin; }

uint32_t shared_address(const void* pointer) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(current->block->arena);
  if (offset >= kArenaBytes) fail("shared_address of a pointer that is not to shared memory", EMULATOR_CALLER);
  return static_cast<uint32_t>(offset);
}

}  // namespace emulator
