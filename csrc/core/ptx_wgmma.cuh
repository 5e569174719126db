// The part of ptx.cuh, which includes it, that only sm_90a has: products of warpgroups.
#pragma once

#include "core/ptx.cuh"

namespace arfast::ptx {

// wgmma of a warpgroup: d[64, N] (+)= a[64, 16] b[16, N], asynchronous, N = 64, 128 or 256. d belongs to the
// instruction from the issue until the wait for its group. Descriptors: see tile.cuh. b is K-major, or N-major with
// kTransposeB.

ARFAST_PTX void wgmma_fence() { ARFAST_SM90A(asm volatile("wgmma.fence.sync.aligned;" :: : "memory")); }
ARFAST_PTX void wgmma_commit() { ARFAST_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory")); }
template <int N>
ARFAST_PTX void wgmma_wait() {
  ARFAST_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"));
}

// The operands %0 to %127 of d.
#define ARFAST_NAMES_32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ARFAST_NAMES_64                                                              \
  ARFAST_NAMES_32                                                                    \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ARFAST_NAMES_128                                                                         \
  ARFAST_NAMES_64                                                                                \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ARFAST_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ARFAST_D16(i) ARFAST_D4(i), ARFAST_D4(i + 4), ARFAST_D4(i + 8), ARFAST_D4(i + 12)
#define ARFAST_D32 ARFAST_D16(0), ARFAST_D16(16)
#define ARFAST_D64 ARFAST_D32, ARFAST_D16(32), ARFAST_D16(48)
#define ARFAST_D128 ARFAST_D64, ARFAST_D16(64), ARFAST_D16(80), ARFAST_D16(96), ARFAST_D16(112)
#define ARFAST_WGMMA_OF(type, n, registers, predicate, operands, ...)                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " predicate                                                \
               ", 0;\n"                                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" ARFAST_NAMES_##registers \
               "}, " operands ";\n}"                                                                        \
               : ARFAST_D##registers                                                                        \
               : __VA_ARGS__)
#define ARFAST_WGMMA(...)                               \
  if constexpr (std::is_same_v<T, BFloat16>) {          \
    ARFAST_SM90A(ARFAST_WGMMA_OF("bf16", __VA_ARGS__)); \
  } else {                                              \
    ARFAST_SM90A(ARFAST_WGMMA_OF("f16", __VA_ARGS__));  \
  }
#define ARFAST_WGMMA_FORMS(n, registers, o0, o1, o2, o3, o4, o5, o6)                                                  \
  template <typename T, int kTransposeB>                                                                              \
  ARFAST_PTX void wgmma_ss(float (&d)[registers], uint64_t a, uint64_t b, int accumulate) {                           \
    ARFAST_WGMMA(n, registers, o2, o0 ", " o1 ", p, 1, 1, 0, " o3, "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeB)) \
  }                                                                                                                   \
  template <typename T, int kTransposeB>                                                                              \
  ARFAST_PTX void wgmma_rs(float (&d)[registers], const uint32_t (&a)[4], uint64_t b, int accumulate) {               \
    ARFAST_WGMMA(n, registers, o5, "{" o0 ", " o1 ", " o2 ", " o3 "}, " o4 ", p, 1, 1, " o6, "r"(a[0]), "r"(a[1]),    \
                 "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB))                                     \
  }
ARFAST_WGMMA_FORMS("64", 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
ARFAST_WGMMA_FORMS("128", 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
ARFAST_WGMMA_FORMS("256", 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

// The registers per thread of a warpgroup, a multiple of 8 in [24, 256].
template <int kCount>
ARFAST_PTX void setmaxnreg_inc() {
  ARFAST_SM90A(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount)));
}
template <int kCount>
ARFAST_PTX void setmaxnreg_dec() {
  ARFAST_SM90A(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount)));
}

}  // namespace arfast::ptx
