// What kernel sources call in the emulator's runtime; device.h and ptx.h dress it in CUDA's and ptx.cuh's names.
// Every function takes its caller's address as the place that reports name.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/types.h"

struct CUtensorMap;

namespace emulator {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  unsigned cluster;
  bool programmatic;
};

// Runs body(context) as every thread of the grid; nullptr, or the report of what is wrong.
const char* run(const Launch& launch, void (*body)(void*), void* context, size_t context_bytes);
[[noreturn]] void trap();
int multiprocessors();
int largest_cluster();
int capability();
size_t shared_bytes();  // that a block may have

// The thread's own coordinates do not change while it runs: the compiler may keep them.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_shape();
__attribute__((const)) uint3 grid_shape();
__attribute__((const)) void* shared_memory();
uint32_t shared_address(const void* pointer);

enum class WarpOp {
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kShuffleDown,
  kBallot,
  kMatch,
  kAdd,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kSignedMin,
  kSignedMax,
  kElect,
  kSync,
  kLoadMatrix,
  kStoreMatrix,
  kMultiply,
};
uint64_t warp(WarpOp op, uint32_t mask, uint64_t value, int argument, int width);
uint32_t active_lanes();

enum class AtomicOp { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareExchange };
enum class AtomicType { kUnsigned32, kSigned32, kUnsigned64, kFloat32 };
uint64_t atomic(AtomicOp op, AtomicType type, void* address, uint64_t operand, uint64_t compare);
void thread_fence();
uint32_t load_acquire(const uint32_t* address);
void store_release(uint32_t* address, uint32_t value);
uint32_t add_acquire_release(uint32_t* address, uint32_t value);

void barrier_sync_all();
void barrier(int id, int threads, bool sync);
uint32_t cluster_rank();
uint32_t cluster_size();
uint32_t map_to_rank(uint32_t address, uint32_t rank);
uint32_t load_remote(uint32_t address);
void cluster_arrive();
void cluster_wait();
void grid_dependency_wait();

void copy_async(uint32_t destination, const void* source, int bytes, int source_bytes);
void copy_async_commit();
void copy_async_wait(int pending);

void mbarrier_init(uint32_t barrier, uint32_t count);
void mbarrier_invalidate(uint32_t barrier);
void mbarrier_arrive(uint32_t barrier);
void mbarrier_expect(uint32_t barrier, uint32_t bytes);
// `cluster`: also for what other blocks of the cluster did.
bool mbarrier_wait(uint32_t barrier, uint32_t parity, bool blocking, bool cluster);
void fence_mbarrier_init();
void fence_proxy_async();

void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier);
void bulk_store(void* destination, uint32_t source, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending, bool read);
void store_async(uint32_t destination, const void* value, uint32_t bytes, uint32_t barrier);

void load_matrix(uint32_t* registers, uint32_t address, int matrices, bool transposed);
void store_matrix(const uint32_t* registers, uint32_t address, int matrices, bool transposed);
void multiply(float* d, const uint32_t* a, const uint32_t* b, bool half);

const char* make_tensor_map(CUtensorMap* map, const void* base, int element_bytes, int rank, const uint64_t* sizes,
                            const uint64_t* strides, const uint32_t* box, int swizzle_bytes);
void tensor_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int rank, const int* coordinates);
void tensor_store(const CUtensorMap* map, uint32_t source, int rank, const int* coordinates);
void group_multiply_fence();
void group_multiply_commit();
void group_multiply_wait(int pending);
// `a` is nullptr when the left operand comes from shared memory, described by descriptor_a.
void group_multiply(float* d, int columns, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b,
                    int accumulate, bool b_transposed, bool half);
void set_registers(int count);

// Memory that kernels may access. It stays until forget_memory(), for the calling thread of the host only. `granule` is
// the size of an element: two threads may write neighbouring elements.
void register_memory(const void* begin, size_t bytes, size_t granule, const char* name);
void forget_memory();

}  // namespace emulator
