// The checks of memory accesses: bounds, alignment, and whether conflicting accesses are ordered.
#include <link.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "emulator/fiber.h"
#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr uintptr_t kPage = 4096;

struct Region {
  uintptr_t begin, end;
  size_t granule;
  std::string name;
};
thread_local std::vector<Region> regions;

struct Page {
  uintptr_t number = 0;
  size_t granule = 1;
  std::vector<Cell> cells;
};
std::unordered_map<uintptr_t, Page> pages;

// What a kernel may read without registration: its constants and the arguments of the launch.
struct Span {
  uintptr_t begin, end;
};
Span image, arguments;

bool inside(const Span& span, uintptr_t address) { return address >= span.begin && address < span.end; }

Page& page_of(uintptr_t address) {
  static Page* last = nullptr;
  static uintptr_t last_number = 0;
  const uintptr_t number = address / kPage;
  if (pages.empty()) last = nullptr;
  if (last != nullptr && last_number == number) return *last;
  Page& page = pages[number];
  if (page.cells.empty()) {
    page.number = number;
    page.granule = 8;
    for (const Region& region : regions) {
      if (region.begin < (number + 1) * kPage && region.end > number * kPage) {
        page.granule = std::min(page.granule, region.granule);
      }
    }
    page.cells.resize(kPage / page.granule);
  }
  last = &page;  // references into an unordered_map stay valid
  last_number = number;
  return page;
}

// "'x' [5, 7] +12" or "shared +0x40".
std::string place_of(uintptr_t address) {
  for (const Region& region : regions) {
    if (address >= region.begin && address < region.end) {
      return "'" + region.name + "' + " + std::to_string(address - region.begin) + " bytes";
    }
  }
  return format("address %p", reinterpret_cast<void*>(address));
}

uintptr_t code_address(const Access& access) { return machine.code + access.pc; }

std::string who(const Access& access) {
  for (const auto& cluster : machine.resident) {
    if (cluster->id == access.cluster) return name_of(*cluster, access.agent);
  }
  if (access.cluster < machine.first_cluster_id) return "the kernel before";
  return format("cluster %u of the grid", access.cluster - machine.first_cluster_id);
}

bool ordered_before_async(const Access& access, const Thread& thread) {
  if (access.cluster < machine.first_cluster_id) return ordered(access, thread);
  if (access.cluster == thread.block->cluster->id && access.agent == thread.agent) {
    return thread.epoch_async >= access.epoch;
  }
  return epoch_in(thread.known.async, access.cluster, access.agent) >= access.epoch;
}

template <typename Where>
void race(const char* what, const Access& before, const Actor& actor, uintptr_t pc, const Where& where) {
  if (!is_new(code_address(before), pc)) return;
  report(code_address(before), pc,
         std::string(what) + " at " + where() + "\n    first:  " + who(before) + place(code_address(before)) +
             "\n    second: " + name_of(*actor.thread->block->cluster, actor.agent) + place(pc));
}

// Judges one access to one cell and records it there. Atomic operations do not conflict with each other.
template <typename Where>
void check_cell(Cell& cell, const Actor& actor, AccessKind kind, uintptr_t pc, uint16_t flags, const Where& where) {
  const Thread& thread = *actor.thread;
  const bool writes = kind == AccessKind::kWrite || kind == AccessKind::kAtomic;
  const bool atomic = kind == AccessKind::kAtomic || kind == AccessKind::kAtomicRead;
  const auto unordered = [&](const Access& access) { return access.cluster != 0 && !ordered(access, thread); };
  const char* after_write = writes ? "race: two writes without order" : "race: write, then read without order";

  const Access& write = cell.write;
  if (write.cluster != 0 && (write.flags & Access::kInFlight) != 0) {
    race("race: access to bytes that cp.async is still writing", write, actor, pc, where);
  } else if (unordered(write)) {
    race(after_write, write, actor, pc, where);
  } else if (actor.async && write.cluster != 0 && (write.flags & Access::kAsync) == 0 &&
             !ordered_before_async(write, thread)) {
    race("missing fence.proxy.async between a write and an asynchronous access", write, actor, pc, where);
  }
  if (!atomic && unordered(cell.atomic)) race(after_write, cell.atomic, actor, pc, where);

  const Access now{thread.block->cluster->id, actor.epoch, static_cast<uint32_t>(pc - machine.code),
                   static_cast<uint16_t>(actor.agent), flags};
  if (!writes) {
    // Two readers are remembered. One whose read is ordered before this one may be forgotten.
    Access* place = &cell.reads[0];
    if (unordered(*place)) {
      place = &cell.reads[1];
      if (unordered(*place) && machine.config.schedule == Config::kRandom) place = &cell.reads[machine.random() & 1];
    }
    *place = now;
    return;
  }
  for (Access& read : cell.reads) {
    const bool both_atomic = atomic && (read.flags & Access::kAtomic) != 0;
    if (!both_atomic && unordered(read)) {
      race("race: read, then write without order (reused too early)", read, actor, pc, where);
    }
    if (!both_atomic) read.cluster = 0;
  }
  if (atomic) {
    cell.atomic = now;
  } else {
    cell.write = now;
    cell.atomic.cluster = 0;
  }
}

}  // namespace

bool ordered(const Access& access, const Thread& thread) {
  if (access.cluster == thread.block->cluster->id && access.agent == thread.agent) return true;
  if (access.cluster < machine.first_cluster_id) {
    return access.cluster < machine.previous_cluster_id || epoch_in(thread.known.generic, machine.previous_done, 0) > 0;
  }
  return epoch_in(thread.known.generic, access.cluster, access.agent) >= access.epoch;
}

void check_shared(Block& block, uint32_t address, uint32_t bytes, const Actor& actor, AccessKind kind, uintptr_t pc,
                  uint16_t flags) {
  if (!machine.config.check) return;
  if (actor.async) flags |= Access::kAsync;
  if (kind == AccessKind::kAtomic || kind == AccessKind::kAtomicRead) flags |= Access::kAtomic;
  const uint32_t begin = address - kSharedBegin;
  for (uint32_t i = begin / 2; i <= (begin + bytes - 1) / 2; ++i) {
    const auto where = [&] { return format("shared +0x%x", i * 2); };
    Cell& cell = block.cells[i];
    if (kind != AccessKind::kWrite && cell.write.cluster == 0 && cell.atomic.cluster == 0) {
      report(pc, 0,
             "uninitialised shared memory is read at " + where() + "\n    by " + name_of(*block.cluster, actor.agent) +
                 place(pc));
    }
    check_cell(cell, actor, kind, pc, flags, where);
  }
}

void check_global(uintptr_t address, uint32_t bytes, const Actor& actor, AccessKind kind, uintptr_t pc) {
  if (!machine.config.check || inside(image, address) || inside(arguments, address)) return;
  uint16_t flags = actor.async ? Access::kAsync : 0;
  if (kind == AccessKind::kAtomic || kind == AccessKind::kAtomicRead) flags |= Access::kAtomic;
  for (uintptr_t at = address; at < address + bytes;) {
    Page& page = page_of(at);
    const auto where = [&] { return place_of(at); };
    check_cell(page.cells[at % kPage / page.granule], actor, kind, pc, flags, where);
    at = (at / page.granule + 1) * page.granule;
  }
}

void check_exit(Block& block) {
  const Ref<Clock> known = block.exited_generic.result();
  const auto check = [&](const Access& access, const char* what, size_t cell) {
    const bool own =
        access.agent >= block.agent && access.agent < block.agent + block.cluster->agents / machine.launch.cluster;
    if (access.cluster != block.cluster->id || own) return;
    if (epoch_in(known, access.cluster, access.agent) >= access.epoch) return;
    report(
        code_address(access), 0,
        format("exit: a block may end before another one's %s of its shared memory, at shared +0x%zx", what, cell * 2) +
            "\n    by " + who(access) + place(code_address(access)));
  };
  for (size_t i = 0; i < block.cells.size(); ++i) {
    check(block.cells[i].write, "write", i);
    for (const Access& read : block.cells[i].reads) check(read, "read", i);
  }
}

char* require_shared(Block& block, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what,
                     uintptr_t pc) {
  if (address % alignment != 0) {
    fail(format("misaligned: %s needs a multiple of %u, got shared +0x%x", what, alignment, address - kSharedBegin),
         pc);
  }
  if (address < kSharedBegin || uint64_t{address} + bytes > kSharedBegin + machine.launch.shared_bytes) {
    fail(format("out of bounds: %s of %u bytes at shared +0x%x, the block has 0x%zx bytes", what, bytes,
                address - kSharedBegin, machine.launch.shared_bytes),
         pc);
  }
  if (block.live == 0) fail(format("%s in the shared memory of a block that has exited", what), pc);
  return block.arena + address;
}

void require_global(uintptr_t address, uint32_t bytes, uint32_t alignment, const char* what, uintptr_t pc) {
  if (address % alignment != 0) {
    fail(format("misaligned: %s needs a multiple of %u bytes, got ", what, alignment) + place_of(address), pc);
  }
  const Region* nearest = nullptr;
  uintptr_t best = uintptr_t{1} << 20;
  for (const Region& region : regions) {
    if (address >= region.begin && address + bytes <= region.end) return;
    const uintptr_t distance = address < region.begin ? region.begin - address : address + bytes - region.end;
    if (distance < best) best = distance, nearest = &region;
  }
  if (inside(image, address) || inside(arguments, address)) return;
  const uintptr_t end = address + bytes;
  for (const auto& cluster : machine.resident) {
    for (const auto& block : cluster->blocks) {
      if (address - reinterpret_cast<uintptr_t>(block->arena) < kArenaBytes) {
        fail(format("%s of another block's shared memory by a plain pointer", what), pc);
      }
    }
  }
  if (on_a_stack(reinterpret_cast<void*>(address))) fail(format("%s of another thread's local memory", what), pc);
  if (nearest == nullptr) {
    fail(format("unregistered memory: %s of %u bytes at %p, which is in no tensor of the call", what, bytes,
                reinterpret_cast<void*>(address)),
         pc);
  }
  const std::string tensor = "'" + nearest->name + format("' (%zu bytes)", size_t{nearest->end - nearest->begin});
  if (address < nearest->begin) {
    fail(format("out of bounds: %s of %u bytes, %zu bytes before the begin of ", what, bytes,
                size_t{nearest->begin - address}) +
             tensor,
         pc);
  }
  fail(format("out of bounds: %s of %u bytes, up to %zu bytes past the end of ", what, bytes,
              size_t{end - nearest->end}) +
           tensor,
       pc);
}

Block& block_of(uint32_t cluster_address, const char* what, uintptr_t pc) {
  const uint32_t rank = cluster_address >> kRankShift;
  if (rank == 0) return *current->block;
  const Cluster& cluster = *current->block->cluster;
  if (rank > cluster.blocks.size()) fail(format("%s: 0x%x is no shared::cluster address", what, cluster_address), pc);
  return *cluster.blocks[rank - 1];
}

void begin_memory(bool keep) {
  if (!keep) pages.clear();
  arguments.begin = reinterpret_cast<uintptr_t>(machine.context);
  arguments.end = arguments.begin + machine.context_bytes;
  const uintptr_t body = reinterpret_cast<uintptr_t>(machine.body);
  if (inside(image, body)) return;
  static uintptr_t wanted;
  wanted = body;
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void*) {
        Span span{~uintptr_t{0}, 0};
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const auto& segment = module->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD) continue;
          span.begin = std::min<uintptr_t>(span.begin, module->dlpi_addr + segment.p_vaddr);
          span.end = std::max<uintptr_t>(span.end, module->dlpi_addr + segment.p_vaddr + segment.p_memsz);
        }
        if (!inside(span, wanted)) return 0;
        image = span;
        return 1;
      },
      nullptr);
  machine.code = image.begin;
}

void register_memory(const void* begin, size_t bytes, size_t granule, const char* name) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  if (bytes == 0) return;
  for (Region& region : regions) {
    if (region.begin == address && region.end == address + bytes && region.granule <= granule) return;
  }
  regions.push_back({address, address + bytes, granule, name});
  // Finer elements than a page of the launch before has cells for: only a programmatic launch still looks at those.
  for (uintptr_t number = address / kPage; number <= (address + bytes - 1) / kPage && !pages.empty(); ++number) {
    const auto page = pages.find(number);
    if (page != pages.end() && page->second.granule > granule) pages.clear();
  }
}

void forget_memory() { regions.clear(); }

}  // namespace emulator
