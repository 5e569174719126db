// Warp collectives: completed by the last lane of the mask to arrive.
#include <algorithm>
#include <bit>
#include <cstring>

#include "emulator/machine.h"

namespace emulator {

void finish_matrix(Block& block, uint32_t warp, const Collective& collective);  // tensor_core.cpp

namespace {

const char* kNames[] = {"__shfl_sync",       "__shfl_xor_sync",   "__shfl_up_sync",    "__shfl_down_sync",
                        "__ballot_sync",     "__match_any_sync",  "__reduce_add_sync", "__reduce_min_sync",
                        "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync",
                        "__reduce_min_sync", "__reduce_max_sync", "elect.sync",        "__syncwarp",
                        "ldmatrix",          "stmatrix",          "mma.sync"};

const char* name_of(WarpOp op) { return kNames[static_cast<int>(op)]; }

Thread& lane_of(Block& block, uint32_t warp, int lane) { return block.threads[warp * 32 + lane]; }

template <typename F>
void for_each_lane(uint32_t mask, const F& f) {
  for (; mask != 0; mask &= mask - 1) f(std::countr_zero(mask));
}

void shuffle(Block& block, uint32_t warp, const Collective& c) {
  for_each_lane(c.arrived, [&](int lane) {
    Thread& thread = lane_of(block, warp, lane);
    const int width = thread.width, argument = thread.argument, begin = lane & ~(width - 1);
    int source = lane;
    switch (c.op) {
      case WarpOp::kShuffle:
        source = begin + (argument & (width - 1));
        break;
      case WarpOp::kShuffleXor:
        source = (lane ^ argument) < begin + width ? lane ^ argument : lane;
        break;
      case WarpOp::kShuffleUp:
        source = lane - argument >= begin ? lane - argument : lane;
        break;
      default:
        source = lane + argument < begin + width ? lane + argument : lane;
    }
    if ((c.arrived >> source & 1) != 0) {
      thread.result = lane_of(block, warp, source).value;
    } else {
      thread.result = ~uint64_t{0};
      report(c.pc, 0,
             format("%s reads lane %d, which does not take part\n    by ", name_of(c.op), source) + name_of(thread) +
                 place(c.pc));
    }
  });
}

uint32_t reduce(WarpOp op, uint32_t a, uint32_t b) {
  switch (op) {
    case WarpOp::kAdd:
      return a + b;
    case WarpOp::kMin:
      return std::min(a, b);
    case WarpOp::kMax:
      return std::max(a, b);
    case WarpOp::kAnd:
      return a & b;
    case WarpOp::kOr:
      return a | b;
    case WarpOp::kXor:
      return a ^ b;
    case WarpOp::kSignedMin:
      return std::min(static_cast<int32_t>(a), static_cast<int32_t>(b));
    default:
      return std::max(static_cast<int32_t>(a), static_cast<int32_t>(b));
  }
}

void finish(Block& block, uint32_t warp, Collective& c) {
  c.live = false;
  const int first = std::countr_zero(c.arrived);
  switch (c.op) {
    case WarpOp::kShuffle:
    case WarpOp::kShuffleXor:
    case WarpOp::kShuffleUp:
    case WarpOp::kShuffleDown:
      shuffle(block, warp, c);
      break;
    case WarpOp::kBallot: {
      uint32_t votes = 0;
      for_each_lane(c.arrived, [&](int i) { votes |= uint32_t{lane_of(block, warp, i).value != 0} << i; });
      for_each_lane(c.arrived, [&](int i) { lane_of(block, warp, i).result = votes; });
      break;
    }
    case WarpOp::kMatch:
      for_each_lane(c.arrived, [&](int i) {
        uint32_t equal = 0;
        for_each_lane(c.arrived, [&](int j) {
          equal |= uint32_t{lane_of(block, warp, i).value == lane_of(block, warp, j).value} << j;
        });
        lane_of(block, warp, i).result = equal;
      });
      break;
    case WarpOp::kElect:
      for_each_lane(c.arrived, [&](int i) { lane_of(block, warp, i).result = i == first; });
      break;
    case WarpOp::kSync: {
      if (!machine.config.check) break;
      ClockBuilder generic, async;
      for_each_lane(c.arrived, [&](int i) { add_to(generic, async, lane_of(block, warp, i)); });
      const Knowledge all{generic.result(), async.result()};
      for_each_lane(c.arrived, [&](int i) {
        lane_of(block, warp, i).known.join(all);
        lane_of(block, warp, i).epoch++;
      });
      break;
    }
    case WarpOp::kLoadMatrix:
    case WarpOp::kStoreMatrix:
    case WarpOp::kMultiply:
      finish_matrix(block, warp, c);
      break;
    default: {
      uint32_t all = static_cast<uint32_t>(lane_of(block, warp, first).value);
      for_each_lane(c.arrived & (c.arrived - 1),
                    [&](int i) { all = reduce(c.op, all, static_cast<uint32_t>(lane_of(block, warp, i).value)); });
      for_each_lane(c.arrived, [&](int i) { lane_of(block, warp, i).result = all; });
    }
  }
  for_each_lane(c.arrived, [&](int i) {
    Thread& thread = lane_of(block, warp, i);
    if (&thread != current) wake(&thread);
  });
}

bool complete(const Block& block, uint32_t warp, const Collective& c) {
  return (c.mask & block.alive[warp] & ~c.arrived) == 0;
}

}  // namespace

// The operands are in the thread already.
void take_part(WarpOp op, uint32_t mask, uintptr_t pc) {
  Thread& self = *current;
  Block& block = *self.block;
  const uint32_t warp = self.number / 32, lane = self.number % 32;
  machine.stats.collectives++;
  if ((mask >> lane & 1) == 0) fail(std::string(name_of(op)) + ": the calling lane is not in the mask", pc);
  auto& all = block.collectives[warp];
  auto match = std::find_if(all.begin(), all.end(), [&](const Collective& c) { return c.live && c.mask == mask; });
  if (match != all.end() && match->op != op) {
    fail(std::string("mismatch: lanes of one mask execute ") + name_of(match->op) + place(match->pc) + " and " +
             name_of(op),
         pc);
  }
  // The compiler may duplicate a call: one source line is one place.
  if (match != all.end() && match->pc != pc && line(match->pc) != line(pc)) {
    report(match->pc, pc,
           std::string("divergence: lanes of one mask execute ") + name_of(op) + " in different places" +
               place(match->pc) + " and" + place(pc));
  }
  if (match == all.end()) {
    match = std::find_if(all.begin(), all.end(), [](const Collective& c) { return !c.live; });
    if (match == all.end()) match = all.insert(all.end(), Collective{});
    *match = {true, op, mask, 0, pc};
  }
  match->arrived |= 1u << lane;
  if (complete(block, warp, *match)) {
    finish(block, warp, *match);
  } else {
    wait_for(Wait::kWarp, static_cast<uint64_t>(op), mask, pc);
  }
}

void exit_warp(Thread& thread) {
  Block& block = *thread.block;
  const uint32_t warp = thread.number / 32;
  for (Collective& c : block.collectives[warp]) {
    if (c.live && complete(block, warp, c)) finish(block, warp, c);
  }
}

uint64_t warp(WarpOp op, uint32_t mask, uint64_t value, int argument, int width) {
  Thread& self = *current;
  self.value = value;
  self.argument = argument;
  self.width = width;
  if (op == WarpOp::kElect) require_sm90("elect_one", EMULATOR_CALLER);
  take_part(op, mask, EMULATOR_CALLER);
  return self.result;
}

// Any set that holds the caller is a legal answer; the smallest one finds code that relies on more.
uint32_t active_lanes() { return 1u << current->number % 32; }

}  // namespace emulator
