// Reports: what is wrong, which threads, which lines. Source lines are looked up only when something is reported.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <tuple>

#include "emulator/fiber.h"
#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr size_t kMaxReports = 8;

std::vector<std::string> texts;
std::set<std::pair<uintptr_t, uintptr_t>> seen;

// "kernel.cu:77 <- kernel.cu:102": the line and the one that it was inlined into, without the emulator's own headers.
std::string look_up(uintptr_t pc) {
  Dl_info module;
  if (pc == 0 || dladdr(reinterpret_cast<void*>(pc), &module) == 0 || module.dli_fname == nullptr) return "?";
  const uintptr_t offset = pc - reinterpret_cast<uintptr_t>(module.dli_fbase);
  FILE* pipe =
      popen(format("addr2line -s -i -e '%s' 0x%zx 2>/dev/null", module.dli_fname, size_t{offset}).c_str(), "r");
  std::string text;
  int lines = 0;
  char buffer[256];
  while (pipe != nullptr && fgets(buffer, sizeof(buffer), pipe) != nullptr) {
    std::string entry(buffer, strcspn(buffer, "\n"));
    entry.resize(std::min(entry.size(), entry.find(" (discriminator")));
    bool own = entry.find("??") != entry.npos;
    for (const char* header : {"device.h:", "ptx.h:", "ptx.cuh:", "runtime.cuh:"}) own |= entry.rfind(header, 0) == 0;
    if (own || lines++ >= 2) continue;
    text += (text.empty() ? "" : " <- ") + entry;
  }
  if (pipe != nullptr) pclose(pipe);
  if (!text.empty()) return text;
  const char* name = strrchr(module.dli_fname, '/');
  return format("%s+0x%zx", name != nullptr ? name + 1 : module.dli_fname, size_t{offset});
}

std::string name_of(const Block& block) {
  const uint3 i = block.index;
  return format("block %u,%u,%u", i.x, i.y, i.z);
}

std::string ranges(const std::vector<uint32_t>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size() && text.size() < 60;) {
    size_t end = i;
    while (end + 1 < numbers.size() && numbers[end + 1] == numbers[end] + 1) ++end;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (end > i) text += "-" + std::to_string(numbers[end]);
    i = end + 1;
    if (i < numbers.size() && text.size() >= 60) text += ", ...";
  }
  return text;
}

std::string wait_text(const Block& block, Wait wait, uint64_t on, uint64_t detail) {
  switch (wait) {
    case Wait::kBarrier: {
      const Barrier& barrier = block.barriers[on];
      const int expected = barrier.threads > 0 ? barrier.threads : block.live;
      return format("barrier %d (%d of %d arrived)", int(on), barrier.arrived, expected);
    }
    case Wait::kWarp:
      return format("a warp collective with mask %08x", unsigned(detail));
    case Wait::kMbarrier:
      for (const auto& m : block.mbarriers) {
        if (m->address != on) continue;
        return format("mbarrier at shared +0x%x, parity %u (phase %u, %u of %u arrivals pending, %ld bytes pending)",
                      unsigned(on) - kSharedBegin, unsigned(detail), m->phase, m->pending, m->count, long(m->bytes));
      }
      return "an mbarrier that was invalidated";
    case Wait::kCluster:
      return format("the cluster's barrier (%d of %d arrived)", block.cluster->arrived, block.cluster->live);
    case Wait::kGroupMultiply:
      return format("wgmma.wait_group in warpgroup %d (%d of 128 there)", int(on), block.warpgroups[on].waiting);
    case Wait::kPoll:
      return "a value to change";
    case Wait::kNone:
      break;
  }
  return "nothing";
}

}  // namespace

std::string format(const char* pattern, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof(text), pattern, arguments);
  va_end(arguments);
  return text;
}

void begin_reports() {
  texts.clear();
  seen.clear();
}

std::string reports() {
  std::string all;
  for (const std::string& text : texts) all += (all.empty() ? "" : "\n") + text;
  return all;
}

std::string line(uintptr_t pc) {
  static std::map<uintptr_t, std::string> known;
  const auto [entry, is_new] = known.try_emplace(pc);
  if (is_new) entry->second = look_up(pc);
  return entry->second;
}

std::string place(uintptr_t pc) { return " at " + line(pc); }

std::string name_of(const Cluster& cluster, uint32_t agent) {
  for (const auto& block : cluster.blocks) {
    const uint32_t threads = block->threads.size();
    if (agent >= block->agent + threads + kExtraAgents) continue;
    const uint32_t i = agent - block->agent;
    const std::string where = name_of(*block) + " ";
    if (i < threads) return where + format("thread %u (warp %u, lane %u)", i, i / 32, i % 32);
    if (i < threads + kMaxMbarriers) {
      const size_t mbarrier = i - threads;
      return where +
             format("copy that completes on the mbarrier at shared +0x%x",
                    block->mbarriers.size() > mbarrier ? block->mbarriers[mbarrier]->address - kSharedBegin : 0);
    }
    if (i < threads + kMaxMbarriers + 2 * kMaxWarps) {
      return where + format("bulk store of warp %u", (i - threads - kMaxMbarriers) % kMaxWarps);
    }
    return where + format("wgmma of warpgroup %u", i - threads - kMaxMbarriers - 2 * kMaxWarps);
  }
  return "?";
}

std::string name_of(const Thread& thread) { return name_of(*thread.block->cluster, thread.agent); }

bool is_new(uintptr_t first, uintptr_t second) {
  return texts.size() < kMaxReports && seen.count({first, second}) == 0;
}

void report(uintptr_t first, uintptr_t second, const std::string& text) {
  if (!is_new(first, second)) return;
  seen.insert({first, second});
  texts.push_back(text);
}

void fail(const std::string& text, uintptr_t pc) {
  std::string all = text;
  if (current != nullptr) all += "\n    by " + name_of(*current);
  if (pc != 0) all += place(pc);
  if (texts.size() == kMaxReports) texts.pop_back();  // this one ends the run: it must be among them
  texts.push_back(all);
  machine.failed = true;
  current = nullptr;
  void* abandoned;
  emulator_switch_stack(&abandoned, machine.main_stack);
  __builtin_unreachable();
}

void require_sm90(const char* what, uintptr_t pc) {
  if (machine.config.capability < 90) fail(std::string(what) + " needs compute capability 9.0", pc);
}

void report_deadlock() {
  std::string text = "deadlock: no thread can run and no copy is on its way";
  for (const auto& cluster : machine.resident) {
    for (const auto& block : cluster->blocks) {
      std::map<std::tuple<Wait, uint64_t, uint64_t, uintptr_t>, std::vector<uint32_t>> groups;
      for (const Thread& t : block->threads) {
        if (!t.exited) groups[{t.wait, t.wait_on, t.wait_detail, t.pc}].push_back(t.number);
      }
      for (const auto& [key, numbers] : groups) {
        const auto [wait, on, detail, pc] = key;
        text += "\n    " + name_of(*block) + " threads " + ranges(numbers) + " wait for " +
                wait_text(*block, wait, on, detail) + place(pc);
      }
      if (const int exited = int(block->threads.size()) - block->live; exited > 0) {
        text += format("\n    %s: %d threads have exited", name_of(*block).c_str(), exited);
      }
      if (text.size() > 2000) break;
    }
  }
  texts.push_back(text);
  machine.failed = true;
}

}  // namespace emulator
