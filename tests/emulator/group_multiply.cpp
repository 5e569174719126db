// wgmma: asynchronous multiplications of warpgroups, whose operands lie in shared memory. A thread's accumulators are
// NaN from the issue until their last group has been waited for.
#include <cmath>
#include <cstring>

#include "emulator/half.h"
#include "emulator/machine.h"

namespace emulator {

struct GroupMultiply {
  int columns;  // N
  bool from_registers;
  uint64_t descriptor_a, descriptor_b;
  bool accumulate, b_transposed, half;
  uintptr_t pc;
  Epoch epoch;
  int arrived = 0;
  int group = -1;  // -1: not committed
  bool retired = false;
  std::vector<Knowledge> checked;  // of the threads that have issued it
  float* registers[128];
  uint32_t a[128][4];
};

namespace {

constexpr int kDepth = 16;  // K of one instruction

Warpgroup& group_of(Thread& thread) { return thread.block->warpgroups[thread.number / 128]; }

// The shared address of element (major, k) of an operand; major counts the rows of A or the columns of B. Bits of a
// descriptor: 0-13 address / 16, 16-29 leading byte offset / 16, 32-45 stride byte offset / 16, 62-63 swizzle (0 none,
// 1 128 bytes, 2 64, 3 32).
uint32_t element_address(uint64_t descriptor, uint32_t major, uint32_t k, bool transposed) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) * 16; };
  const uint32_t begin = field(0), leading = field(16), stride = field(32), mode = descriptor >> 62;
  if (mode == 0) {
    const uint32_t core = transposed ? major % 8 * 2 + k % 8 * 16 : major % 8 * 16 + k % 8 * 2;
    return begin + core + major / 8 * stride + k / 8 * leading;
  }
  const uint32_t span = 256u >> mode;  // bytes of a swizzled row
  uint32_t address = begin;
  if (transposed) {
    address += 2 * major % span + 2 * major / span * leading + k % 8 * span + k / 8 * stride;
  } else {
    address += major % 8 * span + major / 8 * stride + 2 * k;
  }
  return address ^ ((address >> 7 & (span / 16 - 1)) << 4);
}

// Calls f(major, k, address) for every 16 bytes of an operand; they hold 8 consecutive elements.
template <typename F>
void for_each_chunk(uint64_t descriptor, uint32_t size, bool transposed, const F& f) {
  const uint32_t major_step = transposed ? 8 : 1, k_step = transposed ? 1 : 8;
  for (uint32_t major = 0; major < size; major += major_step) {
    for (uint32_t k = 0; k < kDepth; k += k_step) f(major, k, element_address(descriptor, major, k, transposed));
  }
}

void check_operand(Thread& thread, const GroupMultiply& op, uint64_t descriptor, uint32_t size, bool transposed,
                   const char* what) {
  Block& block = *thread.block;
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: a base offset in the descriptor is not emulated", op.pc);
  const Actor actor{&thread, warpgroup_agent(block, static_cast<int>(thread.number / 128)), op.epoch, true};
  for_each_chunk(descriptor, size, transposed, [&](uint32_t, uint32_t, uint32_t address) {
    require_shared(block, address, 16, 16, what, op.pc);
    check_shared(block, address, 16, actor, AccessKind::kRead, op.pc);
  });
}

Accumulator* accumulator_of(Thread& thread, const float* registers) {
  for (Accumulator& accumulator : thread.accumulators) {
    if (accumulator.registers == registers) return &accumulator;
  }
  return nullptr;
}

void execute(Block& block, int warpgroup, const GroupMultiply& op) {
  static float a[64][kDepth], b[kDepth][256], d[64][256];
  const auto value = [&](uint16_t bits) { return op.half ? f16_value(bits) : bf16_value(bits); };
  const auto fetch = [&](uint64_t descriptor, uint32_t size, bool transposed, const auto& put) {
    for_each_chunk(descriptor, size, transposed, [&](uint32_t major, uint32_t k, uint32_t address) {
      uint16_t chunk[8];
      memcpy(chunk, block.arena + address, sizeof(chunk));
      for (uint32_t i = 0; i < 8; ++i) put(transposed ? major + i : major, transposed ? k : k + i, value(chunk[i]));
    });
  };
  if (op.from_registers) {
    for (int row = 0; row < 64; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        const int lane = row / 16 * 32 + row % 8 * 4 + k % 8 / 2, index = row % 16 / 8 + 2 * (k / 8);
        a[row][k] = value(static_cast<uint16_t>(op.a[lane][index] >> (16 * (k % 2))));
      }
    }
  } else {
    fetch(op.descriptor_a, 64, false, [&](uint32_t row, uint32_t k, float x) { a[row][k] = x; });
  }
  fetch(op.descriptor_b, op.columns, op.b_transposed, [&](uint32_t column, uint32_t k, float x) { b[k][column] = x; });

  Thread* const threads = &block.threads[warpgroup * 128];
  float* registers[128];
  for (int i = 0; i < 128; ++i) registers[i] = accumulator_of(threads[i], op.registers[i])->values.data();
  for (int row = 0; row < 64; ++row) {
    // Warp w of the group has rows 16 w to 16 w + 15, in the fragments of mma.sync.
    const auto place = [&](int column) -> float& {
      const int lane = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      return registers[lane][column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
    };
    for (int column = 0; column < op.columns; ++column) d[row][column] = op.accumulate ? place(column) : 0.0f;
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < op.columns; ++column) d[row][column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < op.columns; ++column) place(column) = d[row][column];
  }
}

// Gives back the accumulators that no pending multiplication uses any more.
void give_back(Thread& thread, int lane, const Warpgroup& group) {
  for (const Accumulator& accumulator : std::exchange(thread.accumulators, {})) {
    bool busy = false;
    for (const auto& op : group.pending) busy = busy || op->registers[lane] == accumulator.registers;
    if (busy) {
      thread.accumulators.push_back(accumulator);
    } else {
      memcpy(accumulator.registers, accumulator.values.data(), accumulator.values.size() * sizeof(float));
    }
  }
}

void retire(Block& block, int warpgroup, int pending, uintptr_t pc) {
  Warpgroup& group = block.warpgroups[warpgroup];
  Thread* const threads = &block.threads[warpgroup * 128];
  while (!group.pending.empty()) {
    GroupMultiply& op = *group.pending.front();
    if (op.group < 0 || op.group >= threads[0].multiply_groups - pending) break;
    if (op.arrived != 128) fail(format("wgmma: only %d of 128 threads have issued it", op.arrived), pc);
    execute(block, warpgroup, op);
    group.retired_epoch = op.epoch;
    group.pending.pop_front();
    group.retired++;
  }
  const Cluster& cluster = *block.cluster;
  ClockBuilder clock;
  clock.raise(cluster.id, cluster.agents, warpgroup_agent(block, warpgroup), group.retired_epoch);
  const Knowledge done{clock.result(), clock.result()};
  for (int i = 0; i < 128; ++i) {
    give_back(threads[i], i, group);
    if (machine.config.check) threads[i].known.join(done);
    threads[i].multiply_fenced = threads[i].multiply_fenced && !group.pending.empty();
  }
}

}  // namespace

void group_multiply_fence() { current->multiply_fenced = true; }

void group_multiply(float* d, int columns, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b,
                    int accumulate, bool b_transposed, bool half) {
  const uintptr_t pc = EMULATOR_CALLER;
  Thread& self = *current;
  Block& block = *self.block;
  require_sm90("wgmma", pc);
  Warpgroup& group = group_of(self);
  const int lane = static_cast<int>(self.number % 128);
  if (block.threads.size() < (self.number / 128 + 1) * 128) fail("wgmma: the warpgroup has less than 128 threads", pc);
  if (!self.multiply_fenced)
    report(pc, 0, "wgmma without a wgmma_fence since the last wait\n    by " + name_of(self) + place(pc));
  const size_t index = static_cast<size_t>(self.multiplies++ - group.retired);
  if (index == group.pending.size()) {
    auto op = std::make_shared<GroupMultiply>();
    op->columns = columns;
    op->from_registers = a != nullptr;
    op->descriptor_a = descriptor_a;
    op->descriptor_b = descriptor_b;
    op->accumulate = accumulate != 0;
    op->b_transposed = b_transposed;
    op->half = half;
    op->pc = pc;
    op->epoch = ++group.issued;
    group.pending.push_back(op);
  }
  GroupMultiply& op = *group.pending[index];
  if (op.columns != columns || op.from_registers != (a != nullptr) ||
      (a == nullptr && op.descriptor_a != descriptor_a) || op.descriptor_b != descriptor_b ||
      op.accumulate != (accumulate != 0) || op.b_transposed != b_transposed || op.half != half) {
    fail("mismatch: the threads of a warpgroup disagree on a wgmma's shape, descriptors or flags", pc);
  }
  op.registers[lane] = d;
  if (a != nullptr) memcpy(op.a[lane], a, sizeof(op.a[lane]));
  if (accumulator_of(self, d) == nullptr) {
    self.accumulators.push_back({d, std::vector<float>(d, d + columns / 2)});
    for (int i = 0; i < columns / 2; ++i) d[i] = NAN;
  }
  op.arrived++;
  // Every thread that issues it must know that the operands are there, not only the last one.
  for (const Knowledge& known : op.checked) {
    if (known.generic == self.known.generic && known.async == self.known.async) return;
  }
  op.checked.push_back(self.known);
  if (a == nullptr) check_operand(self, op, descriptor_a, 64, false, "wgmma's left operand");
  check_operand(self, op, descriptor_b, columns, b_transposed, "wgmma's right operand");
}

void group_multiply_commit() {
  Thread& self = *current;
  for (size_t i = 0; i < group_of(self).pending.size(); ++i) {
    GroupMultiply& op = *group_of(self).pending[i];
    const bool issued = static_cast<int>(i) < self.multiplies - group_of(self).retired;
    if (issued && op.group < 0) op.group = self.multiply_groups;
  }
  self.multiply_groups++;
}

void group_multiply_wait(int pending) {
  const uintptr_t pc = EMULATOR_CALLER;
  Thread& self = *current;
  Warpgroup& group = group_of(self);
  const int warpgroup = static_cast<int>(self.number / 128);
  if (group.waiting == 0) {
    group.wait_for = pending;
  } else if (group.wait_for != pending) {
    fail("mismatch: the threads of a warpgroup disagree on wgmma_wait", pc);
  }
  if (++group.waiting < 128) {
    wait_for(Wait::kGroupMultiply, warpgroup, pending, pc);
    return;
  }
  group.waiting = 0;
  retire(*self.block, warpgroup, pending, pc);
  for (int i = 0; i < 128; ++i) {
    Thread& thread = self.block->threads[warpgroup * 128 + i];
    if (thread.wait == Wait::kGroupMultiply) wake(&thread);
  }
}

void set_registers(int count) {
  if (count < 24 || count > 256 || count % 8 != 0) {
    fail(format("setmaxnreg: %d is not a multiple of 8 in [24, 256]", count), EMULATOR_CALLER);
  }
}

void exit_multiplies(Thread& thread) {
  if (!thread.accumulators.empty()) {
    report(4, thread.number / 128, name_of(thread) + " exits while its wgmma are under way");
  }
}

}  // namespace emulator
