// Chooses the instruction set of the CPU implementations, once per process.
#include "core/cpu_target.h"

#include <cstdlib>
#include <cstring>

#include "core/amx.h"

namespace arfast {
namespace {

CpuTarget best_target() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool amx = avx512 && machine_has_amx() && request_amx();
  if (amx) return CpuTarget::kAmx;
  if (avx512) return CpuTarget::kAvx512;
  if (avx2) return CpuTarget::kAvx2;
#endif
  return CpuTarget::kBaseline;
}

CpuTarget choose_target() {
  const CpuTarget best = best_target();
  const char* wish = std::getenv("ARFAST_CPU_TARGET");
  if (wish == nullptr) return best;
  CpuTarget wished = best;
  if (std::strcmp(wish, "baseline") == 0) wished = CpuTarget::kBaseline;
  if (std::strcmp(wish, "avx2") == 0) wished = CpuTarget::kAvx2;
  if (std::strcmp(wish, "avx512") == 0) wished = CpuTarget::kAvx512;
  // A target that the machine lacks would end in an illegal instruction.
  return wished < best ? wished : best;
}

}  // namespace

CpuTarget cpu_target() {
  static const CpuTarget target = choose_target();
  return target;
}

const char* cpu_target_name() {
  switch (cpu_target()) {
    case CpuTarget::kAmx:
      return "amx";
    case CpuTarget::kAvx512:
      return "avx512";
    case CpuTarget::kAvx2:
      return "avx2";
    case CpuTarget::kBaseline:
      return "baseline";
  }
  return "unknown";
}

}  // namespace arfast
