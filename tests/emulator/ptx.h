// The emulated twins of the functions of csrc/core/ptx.cuh.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "emulator/device.h"
#include "emulator/tensor_map.h"

namespace arfast::ptx {

__forceinline__ uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }
__forceinline__ uint4 load_streaming(const uint4* address) { return *address; }
__forceinline__ void store_streaming(uint4* address, uint4 value) { *address = value; }
__forceinline__ uint32_t load_acquire(const uint32_t* address) { return emulator::load_acquire(address); }
__forceinline__ void store_release(uint32_t* address, uint32_t value) { emulator::store_release(address, value); }
__forceinline__ uint32_t add_acquire_release(uint32_t* address, uint32_t value) {
  return emulator::add_acquire_release(address, value);
}
__forceinline__ void add_relaxed(float* address, float x, float y) {
  emulator::atomic<float>(emulator::AtomicOp::kAdd, address, x);
  emulator::atomic<float>(emulator::AtomicOp::kAdd, address + 1, y);
}
__forceinline__ void prefetch_l2(const void*) {}

// Flushes subnormal numbers, as .ftz does.
__forceinline__ float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
__forceinline__ float exp2_approx(float x) { return flush(exp2f(flush(x))); }
__forceinline__ float log2_approx(float x) { return log2f(flush(x)); }

__forceinline__ uint32_t pack_bf16x2(float low, float high) {
  return emulator::bf16_bits(low) | uint32_t{emulator::bf16_bits(high)} << 16;
}
__forceinline__ uint32_t pack_f16x2(float low, float high) {
  return emulator::f16_bits(low) | uint32_t{emulator::f16_bits(high)} << 16;
}

__forceinline__ bool elect_one() { return emulator::warp(emulator::WarpOp::kElect, 0xffffffffu, 0, 0, 32) != 0; }

__forceinline__ void cp_async16(uint32_t dst, const void* src, int src_bytes = 16) {
  emulator::copy_async(dst, src, 16, src_bytes);
}
__forceinline__ void cp_async_commit() { emulator::copy_async_commit(); }
template <int N>
__forceinline__ void cp_async_wait() {
  emulator::copy_async_wait(N);
}

__forceinline__ void barrier_sync(int id, int threads) { emulator::barrier(id, threads, true); }
__forceinline__ void barrier_arrive(int id, int threads) { emulator::barrier(id, threads, false); }

__forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) { emulator::mbarrier_init(bar, count); }
__forceinline__ void mbarrier_invalidate(uint32_t bar) { emulator::mbarrier_invalidate(bar); }
__forceinline__ void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
__forceinline__ void fence_proxy_async() { emulator::fence_proxy_async(); }
__forceinline__ void mbarrier_arrive(uint32_t bar) { emulator::mbarrier_arrive(bar); }
__forceinline__ void mbarrier_expect_tx(uint32_t bar, uint32_t bytes) { emulator::mbarrier_expect(bar, bytes); }
__forceinline__ void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  emulator::mbarrier_expect(bar, bytes);
  emulator::mbarrier_arrive(bar);
}
__forceinline__ bool mbarrier_test(uint32_t bar, uint32_t parity) {
  return emulator::mbarrier_wait(bar, parity, false, false);
}
__forceinline__ bool mbarrier_test_cluster(uint32_t bar, uint32_t parity) {
  return emulator::mbarrier_wait(bar, parity, false, true);
}
__forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) { emulator::mbarrier_wait(bar, parity, true, false); }
__forceinline__ void mbarrier_wait_cluster(uint32_t bar, uint32_t parity) {
  emulator::mbarrier_wait(bar, parity, true, true);
}
__forceinline__ void mbarrier_arrive_remote(uint32_t cluster_address) { emulator::mbarrier_arrive(cluster_address); }
__forceinline__ void mbarrier_arrive_remote_shared(uint32_t cluster_address) {
  emulator::mbarrier_arrive(cluster_address);
}

__forceinline__ void bulk_load(uint32_t dst_shared, const void* src, uint32_t bytes, uint32_t bar) {
  emulator::bulk_load(dst_shared, src, bytes, bar);
}
__forceinline__ void bulk_store(void* dst, uint32_t src_shared, uint32_t bytes) {
  emulator::bulk_store(dst, src_shared, bytes);
}
__forceinline__ void bulk_commit() { emulator::bulk_commit(); }
template <int N>
__forceinline__ void bulk_wait_read() {
  emulator::bulk_wait(N, true);
}
template <int N>
__forceinline__ void bulk_wait() {
  emulator::bulk_wait(N, false);
}

__forceinline__ uint32_t cluster_rank() { return emulator::cluster_rank(); }
__forceinline__ uint32_t cluster_size() { return emulator::cluster_size(); }
__forceinline__ uint32_t map_to_rank(uint32_t shared_address, uint32_t rank) {
  return emulator::map_to_rank(shared_address, rank);
}
__forceinline__ void store_async(uint32_t remote_address, uint2 value, uint32_t remote_bar) {
  emulator::store_async(remote_address, &value, sizeof(value), remote_bar);
}
__forceinline__ void store_async(uint32_t remote_address, uint4 value, uint32_t remote_bar) {
  emulator::store_async(remote_address, &value, sizeof(value), remote_bar);
}
__forceinline__ void cluster_arrive() { emulator::cluster_arrive(); }
__forceinline__ void cluster_wait() { emulator::cluster_wait(); }
__forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
__forceinline__ uint32_t load_remote(uint32_t cluster_address) { return emulator::load_remote(cluster_address); }

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { emulator::load_matrix(r, row, 4, false); }
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { emulator::load_matrix(r, row, 4, true); }
__forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) { emulator::store_matrix(r, row, 4, false); }
__forceinline__ void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
  emulator::store_matrix(r, row, 4, true);
}
template <typename T>
__forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulator::multiply(d, a, b, std::is_same_v<T, Float16>);
}

__forceinline__ void wgmma_fence() { emulator::group_multiply_fence(); }
__forceinline__ void wgmma_commit() { emulator::group_multiply_commit(); }
template <int N>
__forceinline__ void wgmma_wait() {
  emulator::group_multiply_wait(N);
}
template <typename T, int kTransposeB, int kRegisters>
__forceinline__ void wgmma_ss(float (&d)[kRegisters], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kRegisters == 32 || kRegisters == 64 || kRegisters == 128);
  emulator::group_multiply(d, 2 * kRegisters, nullptr, a, b, accumulate, kTransposeB, std::is_same_v<T, Float16>);
}
template <typename T, int kTransposeB, int kRegisters>
__forceinline__ void wgmma_rs(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(kRegisters == 32 || kRegisters == 64 || kRegisters == 128);
  emulator::group_multiply(d, 2 * kRegisters, a, 0, b, accumulate, kTransposeB, std::is_same_v<T, Float16>);
}
template <int kCount>
__forceinline__ void setmaxnreg_inc() {
  emulator::set_registers(kCount);
}
template <int kCount>
__forceinline__ void setmaxnreg_dec() {
  emulator::set_registers(kCount);
}

template <typename... Coordinates>
__forceinline__ void tensor_load(uint32_t dst_shared, const CUtensorMap* map, uint32_t bar, Coordinates... at) {
  const int coordinates[] = {at...};
  emulator::tensor_load(dst_shared, map, bar, sizeof...(at), coordinates);
}
template <typename... Coordinates>
__forceinline__ void tensor_store(const CUtensorMap* map, uint32_t src_shared, Coordinates... at) {
  const int coordinates[] = {at...};
  emulator::tensor_store(map, src_shared, sizeof...(at), coordinates);
}
__forceinline__ void tensor_prefetch_map(const CUtensorMap*) {}

__forceinline__ void grid_dependency_wait() { emulator::grid_dependency_wait(); }
__forceinline__ void grid_dependency_launch() {}

}  // namespace arfast::ptx
