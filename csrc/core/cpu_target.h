// One CPU source, several instruction sets. Every `<op>_cpu.cpp` is compiled once per target with ARFAST_CPU_TARGET
// naming the namespace its functions live in; the best target that the machine has is chosen at run time.
#pragma once

namespace arfast {

// kAmx: what kAvx512 is, and matrix units (core/amx.h).
enum class CpuTarget { kBaseline, kAvx2, kAvx512, kAmx };

// The best target of this machine, or the one that the environment variable ARFAST_CPU_TARGET names
// (baseline | avx2 | avx512 | amx) when the machine has it. Decided once.
CpuTarget cpu_target();
const char* cpu_target_name();

}  // namespace arfast

// Declares `void name(const Params&)` for every target, and `name_cpu(params)`, which calls the chosen one.
#if defined(ARFAST_EMULATED)  // the tests' emulated GPU: no CPU implementation is linked
#define ARFAST_CPU_FUNCTION(name, Params) \
  inline void name##_cpu(const Params&) {}
#elif defined(__x86_64__)
#define ARFAST_CPU_FUNCTION(name, Params)        \
  namespace baseline {                           \
  void name(const Params& params);               \
  }                                              \
  namespace avx2 {                               \
  void name(const Params& params);               \
  }                                              \
  namespace avx512 {                             \
  void name(const Params& params);               \
  }                                              \
  inline void name##_cpu(const Params& params) { \
    switch (cpu_target()) {                      \
      case CpuTarget::kAmx:                      \
      case CpuTarget::kAvx512:                   \
        return avx512::name(params);             \
      case CpuTarget::kAvx2:                     \
        return avx2::name(params);               \
      case CpuTarget::kBaseline:                 \
        return baseline::name(params);           \
    }                                            \
  }
#else
#define ARFAST_CPU_FUNCTION(name, Params) \
  namespace baseline {                    \
  void name(const Params& params);        \
  }                                       \
  inline void name##_cpu(const Params& params) { baseline::name(params); }
#endif
