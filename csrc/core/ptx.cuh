// One function per PTX instruction form: with ptx_wgmma.cuh the only file with inline assembly. The emulated GPU of the
// tests has a twin of each (tests/emulator/ptx.h). Shared memory is addressed by 32-bit shared addresses, as the
// instructions do.
//
// Kernels that need sm_90 are compiled for sm_80 too, where these instructions become a trap: launchers ask
// kernel_capability() first.
#pragma once

#if defined(ARFAST_EMULATED)
#include "emulator/ptx.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"

#define ARFAST_PTX __device__ __forceinline__
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define ARFAST_SM90(...) __VA_ARGS__
#define ARFAST_SM90_OR_NOTHING(...) __VA_ARGS__
#else
#define ARFAST_SM90(...) __trap()
#define ARFAST_SM90_OR_NOTHING(...)
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ARFAST_SM90A(...) __VA_ARGS__
#else
#define ARFAST_SM90A(...) __trap()
#endif

namespace arfast::ptx {

// Memory.

ARFAST_PTX uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Memory that no thread of the grid writes, read once: it does not displace other lines of the L1 cache.
ARFAST_PTX uint4 load_streaming(const uint4* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// Written once and not read soon.
ARFAST_PTX void store_streaming(uint4* address, uint4 value) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
ARFAST_PTX void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
ARFAST_PTX uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
ARFAST_PTX void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
ARFAST_PTX uint32_t add_acquire_release(uint32_t* address, uint32_t value) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
  return old;
}

// Adds to two neighbours, aligned to 8 bytes, in any order with other threads' additions.
ARFAST_PTX void add_relaxed(float* address, float x, float y) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x), "f"(y) : "memory");
#else
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address + 1), "f"(y) : "memory");
#endif
}

// Arithmetic. Subnormal numbers count as zero.

ARFAST_PTX float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ARFAST_PTX float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ARFAST_PTX uint32_t pack_bf16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
ARFAST_PTX uint32_t pack_f16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// True for one lane of the warp, always the same one. All lanes call it.
ARFAST_PTX bool elect_one() {
  uint32_t elected = 0;
  ARFAST_SM90(asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected)));
  return elected != 0;
}

// cp.async: 16 bytes from global to shared memory; what lies beyond `src_bytes` becomes zero.

ARFAST_PTX void cp_async16(uint32_t dst, const void* src, int src_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(src_bytes) : "memory");
}
ARFAST_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the N youngest groups of this thread are pending.
template <int N>
ARFAST_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Named barriers of a part of the block: `threads` is a multiple of 32 and counts those that wait and those that only
// arrive. The id is in [1, 15]; 0 is that of __syncthreads.

ARFAST_PTX void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
ARFAST_PTX void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// mbarriers: 8 bytes of shared memory, which count the arrivals and the bytes that a phase still waits for.

ARFAST_PTX void mbarrier_init(uint32_t bar, uint32_t count) {
  ARFAST_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory"));
}
ARFAST_PTX void mbarrier_invalidate(uint32_t bar) {
  ARFAST_SM90(asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bar) : "memory"));
}

// Between mbarrier_init and the use by other blocks of the cluster or by asynchronous copies.
ARFAST_PTX void fence_mbarrier_init() {
  ARFAST_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}

// Between accesses of threads and asynchronous ones (bulk copies, wgmma) to the same memory.
ARFAST_PTX void fence_proxy_async() { ARFAST_SM90(asm volatile("fence.proxy.async;" :: : "memory")); }
ARFAST_PTX void mbarrier_arrive(uint32_t bar) {
  ARFAST_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"));
}

// The mbarrier of any block of the cluster: `remote` comes from map_to_rank.
ARFAST_PTX void mbarrier_arrive_remote(uint32_t remote) {
  ARFAST_SM90(asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory"));
}
// The same for accesses to the block's own shared memory alone: where nvcc knows the fence (from 12.8 on) it waits for
// no store to global memory.
ARFAST_PTX void mbarrier_arrive_remote_shared(uint32_t remote) {
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
  ARFAST_SM90(
      asm volatile("fence.release.sync_restrict::shared::cta.cluster;\n"
                   "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory"));
#else
  mbarrier_arrive_remote(remote);
#endif
}
ARFAST_PTX void mbarrier_expect_tx(uint32_t bar, uint32_t bytes) {
  ARFAST_SM90(
      asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes) : "memory"));
}
ARFAST_PTX void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  ARFAST_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory"));
}

// Whether the phase of that parity is over. The phases alternate, beginning with parity 0.
#define ARFAST_TRY_WAIT(order)                                                                                \
  uint32_t over = 0;                                                                                          \
  ARFAST_SM90(asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity" order                                 \
                           ".shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(over) : "r"(bar), \
                           "r"(parity) : "memory"));                                                          \
  return over != 0
ARFAST_PTX bool mbarrier_test(uint32_t bar, uint32_t parity) { ARFAST_TRY_WAIT(""); }
ARFAST_PTX bool mbarrier_test_cluster(uint32_t bar, uint32_t parity) { ARFAST_TRY_WAIT(".acquire.cluster"); }
ARFAST_PTX void mbarrier_wait(uint32_t bar, uint32_t parity) {
  while (!mbarrier_test(bar, parity)) continue;
}
// As mbarrier_wait, also for what other blocks of the cluster did before they arrived.
ARFAST_PTX void mbarrier_wait_cluster(uint32_t bar, uint32_t parity) {
  while (!mbarrier_test_cluster(bar, parity)) continue;
}

// Bulk copies by the asynchronous proxy: addresses and sizes are multiples of 16 bytes.

// Completes `bytes` of the mbarrier's current phase.
ARFAST_PTX void bulk_load(uint32_t dst_shared, const void* src, uint32_t bytes, uint32_t bar) {
  ARFAST_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst_shared),
      "l"(src), "r"(bytes), "r"(bar) : "memory"));
}
ARFAST_PTX void bulk_store(void* dst, uint32_t src_shared, uint32_t bytes) {
  ARFAST_SM90(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src_shared),
                           "r"(bytes) : "memory"));
}
ARFAST_PTX void bulk_commit() { ARFAST_SM90(asm volatile("cp.async.bulk.commit_group;" :: : "memory")); }

// Until at most the N youngest groups of this thread still read shared memory.
template <int N>
ARFAST_PTX void bulk_wait_read() {
  ARFAST_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"));
}

// Until at most the N youngest groups of this thread are incomplete.
template <int N>
ARFAST_PTX void bulk_wait() {
  ARFAST_SM90(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"));
}

// Matrices of 8 x 8 elements of 16 bits. Lanes 8 i to 8 i + 7 give the rows of matrix i. Element (r, c) is in lane
// 4 r + c / 2, half c % 2; with `trans` in lane 4 c + r / 2, half r % 2.

ARFAST_PTX void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
ARFAST_PTX void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
ARFAST_PTX void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  ARFAST_SM90(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                           "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}
ARFAST_PTX void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
  ARFAST_SM90(asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                           "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}

// d[16, 8] += a[16, 16] b[16, 8] of a warp. With g = lane / 4, q = lane % 4: a holds (g, 2q), (g + 8, 2q), (g, 2q + 8),
// (g + 8, 2q + 8) with 2 consecutive k each; b0, b1 hold k = 2q and 2q + 8 of column g; d (g, 2q), (g, 2q + 1), then
// row g + 8.
#define ARFAST_MMA(type)                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <typename T>
ARFAST_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    ARFAST_MMA("bf16");
  } else {
    ARFAST_MMA("f16");
  }
}

// Boxes of tensors by the asynchronous proxy: see tensor_map.cuh. Coordinates in elements, the innermost first.
#define ARFAST_TENSOR_LOAD(rank, coordinates, ...)                                                        \
  ARFAST_SM90(asm volatile("cp.async.bulk.tensor." rank                                                   \
                           ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, " coordinates \
                           "], [%2];" ::"r"(dst_shared),                                                  \
                           "l"(map), "r"(bar), __VA_ARGS__ : "memory"))
#define ARFAST_TENSOR_STORE(rank, coordinates, ...)                                                        \
  ARFAST_SM90(asm volatile("cp.async.bulk.tensor." rank ".global.shared::cta.bulk_group [%0, " coordinates \
                           "], [%1];" ::"l"(map),                                                          \
                           "r"(src_shared), __VA_ARGS__ : "memory"))
ARFAST_PTX void tensor_load(uint32_t dst_shared, const CUtensorMap* map, uint32_t bar, int x, int y) {
  ARFAST_TENSOR_LOAD("2d", "{%3, %4}", "r"(x), "r"(y));
}
ARFAST_PTX void tensor_load(uint32_t dst_shared, const CUtensorMap* map, uint32_t bar, int x, int y, int z) {
  ARFAST_TENSOR_LOAD("3d", "{%3, %4, %5}", "r"(x), "r"(y), "r"(z));
}
ARFAST_PTX void tensor_load(uint32_t dst_shared, const CUtensorMap* map, uint32_t bar, int x, int y, int z, int w) {
  ARFAST_TENSOR_LOAD("4d", "{%3, %4, %5, %6}", "r"(x), "r"(y), "r"(z), "r"(w));
}
ARFAST_PTX void tensor_store(const CUtensorMap* map, uint32_t src_shared, int x, int y) {
  ARFAST_TENSOR_STORE("2d", "{%2, %3}", "r"(x), "r"(y));
}
ARFAST_PTX void tensor_store(const CUtensorMap* map, uint32_t src_shared, int x, int y, int z) {
  ARFAST_TENSOR_STORE("3d", "{%2, %3, %4}", "r"(x), "r"(y), "r"(z));
}
ARFAST_PTX void tensor_store(const CUtensorMap* map, uint32_t src_shared, int x, int y, int z, int w) {
  ARFAST_TENSOR_STORE("4d", "{%2, %3, %4, %5}", "r"(x), "r"(y), "r"(z), "r"(w));
}
ARFAST_PTX void tensor_prefetch_map(const CUtensorMap* map) {
  ARFAST_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"));
}

// Clusters.

ARFAST_PTX uint32_t cluster_rank() {
  uint32_t rank = 0;
  ARFAST_SM90(asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return rank;
}
ARFAST_PTX uint32_t cluster_size() {
  uint32_t size = 1;
  ARFAST_SM90(asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size)));
  return size;
}

// The same place in the shared memory of the cluster's block `rank`.
ARFAST_PTX uint32_t map_to_rank(uint32_t shared_address, uint32_t rank) {
  uint32_t mapped = 0;
  ARFAST_SM90(asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared_address), "r"(rank)));
  return mapped;
}
ARFAST_PTX uint32_t load_remote(uint32_t cluster_address) {
  uint32_t value = 0;
  ARFAST_SM90(asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(cluster_address) : "memory"));
  return value;
}

// Stores into a block of the cluster and completes the bytes of an mbarrier there.
ARFAST_PTX void store_async(uint32_t remote, uint2 value, uint32_t bar) {
  ARFAST_SM90(asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(remote),
      "r"(value.x), "r"(value.y), "r"(bar) : "memory"));
}
ARFAST_PTX void store_async(uint32_t remote, uint4 value, uint32_t bar) {
  ARFAST_SM90(asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(bar) : "memory"));
}
ARFAST_PTX void cluster_arrive() { ARFAST_SM90(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory")); }
ARFAST_PTX void cluster_wait() { ARFAST_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory")); }
ARFAST_PTX void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Kernels launched with LaunchShape::programmatic. Before sm_90 launches are never programmatic, and these do nothing.

// Before the first access to what the kernel before on the stream reads or writes.
ARFAST_PTX void grid_dependency_wait() { ARFAST_SM90_OR_NOTHING(asm volatile("griddepcontrol.wait;" :: : "memory")); }

// Lets the next kernel begin; it sees what this one writes only after its grid_dependency_wait.
ARFAST_PTX void grid_dependency_launch() {
  ARFAST_SM90_OR_NOTHING(asm volatile("griddepcontrol.launch_dependents;" :: : "memory"));
}

}  // namespace arfast::ptx

#include "core/ptx_wgmma.cuh"

#endif
