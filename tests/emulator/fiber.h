// Stacks of emulated threads and the switch between them; ucontext would ask the kernel for the signal mask each time.
#pragma once

#include <cstddef>

// Saves the callee-saved registers on the current stack and its pointer in *save, then continues on the stack `load`.
extern "C" void emulator_switch_stack(void** save, void* load);

namespace emulator {

constexpr size_t kStackBytes = 128 << 10;

// A stack with a guard page below it; give_stack keeps it for the next thread.
char* take_stack();
void give_stack(char* stack);
bool on_a_stack(const void* address);

// The stack pointer with which `entry` begins on `stack`.
void* prepare_stack(char* stack, void (*entry)());

}  // namespace emulator
