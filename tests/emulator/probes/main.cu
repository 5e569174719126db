// Runs the right probes on a GPU: what the emulator takes for granted there must hold.
//   nvcc -std=c++17 -arch=sm_90a -Icsrc -Itests tests/emulator/probes/*.cu -o probes && ./probes
#include "emulator/probes/probe.h"

int main() {
  int failed = 0, count = 0;
  for (const probe::Entry& entry : probe::entries()) {
    if (entry.expected != nullptr) continue;
    const char* error = entry.run();
    failed += error != nullptr;
    count++;
    std::printf("%-50s %s\n", entry.name, error == nullptr ? "passed" : error);
    if (error != nullptr && cudaGetLastError() != cudaSuccess) break;  // the context is lost
  }
  std::printf("probes: %d of %d failed\n", failed, count);
  return failed != 0;
}
