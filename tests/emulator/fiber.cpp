// Stacks of emulated threads: see fiber.h. x86-64 System V only.
#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

asm(R"(
.text
.p2align 4
.globl emulator_switch_stack
.type emulator_switch_stack,@function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");

namespace emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStacksPerRegion = 256;

// One mapping holds many stacks, so that the test "is this address on a stack" looks at few ranges.
struct Stacks {
  std::vector<char*> regions;
  std::vector<char*> free;
};

Stacks& stacks() {
  static Stacks all;
  return all;
}

}  // namespace

char* take_stack() {
  Stacks& all = stacks();
  if (all.free.empty()) {
    const size_t bytes = kStacksPerRegion * kStackBytes;
    void* region =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (region == MAP_FAILED) throw std::bad_alloc();
    all.regions.push_back(static_cast<char*>(region));
    for (size_t i = kStacksPerRegion; i-- > 0;) {
      char* stack = all.regions.back() + i * kStackBytes;
      mprotect(stack, kPage, PROT_NONE);
      all.free.push_back(stack);
    }
  }
  char* stack = all.free.back();
  all.free.pop_back();
  return stack;
}

void give_stack(char* stack) { stacks().free.push_back(stack); }

bool on_a_stack(const void* address) {
  for (const char* region : stacks().regions) {
    if (reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(region) < kStacksPerRegion * kStackBytes) {
      return true;
    }
  }
  return false;
}

void* prepare_stack(char* stack, void (*entry)()) {
  // `entry` starts as if called: the stack pointer is 8 below a multiple of 16, at a return address that is never used.
  uint64_t* top = reinterpret_cast<uint64_t*>(stack + kStackBytes) - 1;
  *top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = 0;
  return top;
}

}  // namespace emulator
