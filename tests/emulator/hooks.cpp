// What kernels that are compiled with -fsanitize=thread and =alignment,bounds,shift call at their plain accesses. The
// sanitizers' own libraries are not linked.
#include <cstring>

#include "emulator/fiber.h"
#include "emulator/machine.h"

namespace emulator {
namespace {

inline __attribute__((always_inline)) void plain_access(void* pointer, uint32_t bytes, AccessKind kind,
                                                        uint32_t alignment, uintptr_t pc) {
  Thread* self = current;  // nullptr in launchers
  if (self == nullptr) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - reinterpret_cast<uintptr_t>(self->stack) < kStackBytes) return;
  machine.stats.accesses++;
  if (kind == AccessKind::kWrite) machine.progress++;
  if (!machine.config.check) return;
  const char* what = kind == AccessKind::kWrite ? "write" : "read";
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(self->block->arena);
  if (offset < kArenaBytes) {
    require_shared(*self->block, static_cast<uint32_t>(offset), bytes, alignment, what, pc);
    check_shared(*self->block, static_cast<uint32_t>(offset), bytes, self_actor(*self), kind, pc);
  } else {
    require_global(address, bytes, alignment, what, pc);
    check_global(address, bytes, self_actor(*self), kind, pc);
  }
  if (machine.config.jitter > 0 && machine.random() % machine.config.jitter == 0) yield();
}

struct SourceLocation {
  const char* file;
  unsigned line, column;
};

void undefined_behaviour(const char* what, const SourceLocation& at) {
  if (current == nullptr) return;
  const char* name = strrchr(at.file, '/');
  fail(format("%s at %s:%u:%u", what, name != nullptr ? name + 1 : at.file, at.line, at.column), 0);
}

}  // namespace
}  // namespace emulator

using emulator::AccessKind;
using emulator::SourceLocation;

extern "C" {

#define EMULATOR_HOOKS(bytes)                                                                                         \
  void __tsan_read##bytes(void* p) { emulator::plain_access(p, bytes, AccessKind::kRead, bytes, EMULATOR_CALLER); }   \
  void __tsan_write##bytes(void* p) { emulator::plain_access(p, bytes, AccessKind::kWrite, bytes, EMULATOR_CALLER); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                                        \
    emulator::plain_access(p, bytes, AccessKind::kRead, 1, EMULATOR_CALLER);                                          \
  }                                                                                                                   \
  void __tsan_unaligned_write##bytes(void* p) {                                                                       \
    emulator::plain_access(p, bytes, AccessKind::kWrite, 1, EMULATOR_CALLER);                                         \
  }                                                                                                                   \
  void __tsan_volatile_read##bytes(void* p) {                                                                         \
    emulator::plain_access(p, bytes, AccessKind::kRead, bytes, EMULATOR_CALLER);                                      \
  }                                                                                                                   \
  void __tsan_volatile_write##bytes(void* p) {                                                                        \
    emulator::plain_access(p, bytes, AccessKind::kWrite, bytes, EMULATOR_CALLER);                                     \
  }
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)

void __tsan_read_range(void* p, unsigned long bytes) {
  emulator::plain_access(p, static_cast<uint32_t>(bytes), AccessKind::kRead, 1, EMULATOR_CALLER);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  emulator::plain_access(p, static_cast<uint32_t>(bytes), AccessKind::kWrite, 1, EMULATOR_CALLER);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Launchers only: guards of their static variables.
unsigned char __tsan_atomic8_load(const unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
unsigned __tsan_atomic32_load(const unsigned* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
unsigned long __tsan_atomic64_load(const unsigned long* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(unsigned* p, unsigned v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
unsigned __tsan_atomic32_fetch_add(unsigned* p, unsigned v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }

void __ubsan_handle_type_mismatch_v1(void* data, void* pointer) {
  struct Data {
    SourceLocation at;
    void* type;
    unsigned char log_alignment, kind;
  };
  const Data& mismatch = *static_cast<Data*>(data);
  const uintptr_t alignment = uintptr_t{1} << mismatch.log_alignment;
  if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return;
  emulator::undefined_behaviour(
      emulator::format("misaligned: access needs a multiple of %zu bytes", size_t{alignment}).c_str(), mismatch.at);
}
void __ubsan_handle_out_of_bounds(void* data, void*) {
  emulator::undefined_behaviour("out of bounds: index of an array", *static_cast<SourceLocation*>(data));
}
void __ubsan_handle_shift_out_of_bounds(void* data, void*, void*) {
  emulator::undefined_behaviour("shift by a number of bits outside of the type", *static_cast<SourceLocation*>(data));
}

}  // extern "C"
