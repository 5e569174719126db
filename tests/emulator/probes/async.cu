// Probes of asynchronous copies within a block: cp.async, mbarriers and bulk copies.
#include "emulator/probes/probe.h"

namespace probe {
namespace {

constexpr int kThreads = 96;  // warp 0 produces, warps 1 and 2 consume
constexpr int kConsumers = 64;
constexpr int kStages = 2, kTiles = 5;

struct alignas(16) Pipeline {
  int tile[kStages][kConsumers];
  int results[kConsumers];
  alignas(8) uint64_t full[kStages];
  alignas(8) uint64_t empty[kStages];
};

// Bulk loads through a ring of stages; a bulk store of the sums.
template <int kBug>
__global__ void pipeline_kernel(const int* in, int* out) {
  Pipeline& smem = shared_storage<Pipeline>();
  const int t = threadIdx.x;
  if (t == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(ptx::shared_address(&smem.full[s]), kBug == 1 ? 2 : 1);
      ptx::mbarrier_init(ptx::shared_address(&smem.empty[s]), kBug == 2 ? kConsumers - 1 : kConsumers);
      if (kBug == 3) ptx::mbarrier_init(ptx::shared_address(&smem.full[s]), 1);
    }
    if (kBug != 4) ptx::fence_mbarrier_init();
  }
  if (kBug != 5) __syncthreads();
  constexpr uint32_t bytes = sizeof(smem.tile[0]);
  if (t < 32) {
    for (int i = 0; i < kTiles && t == 0; ++i) {
      const int stage = i % kStages;
      const uint32_t parity = i / kStages % 2, full = ptx::shared_address(&smem.full[stage]);
      if (kBug != 6) {
        ptx::mbarrier_wait(ptx::shared_address(&smem.empty[stage]), kBug == 7 ? parity : parity ^ 1);
      }
      ptx::mbarrier_arrive_expect_tx(full, kBug == 8 ? bytes + 16 : bytes);
      const uint32_t tile = ptx::shared_address(smem.tile[stage]) + (kBug == 9 ? 8 : 0);
      ptx::bulk_load(tile, in + i * kConsumers, kBug == 10 ? bytes - 8 : bytes, kBug == 11 ? full + 64 : full);
    }
    if (kBug == 12) smem.full[0] = 0;
    return;
  }
  const int c = t - 32;
  int sum = 0;
  for (int i = 0; i < kTiles; ++i) {
    const int stage = i % kStages;
    const uint32_t parity = i / kStages % 2, empty = ptx::shared_address(&smem.empty[stage]);
    if (kBug != 13) ptx::mbarrier_wait(ptx::shared_address(&smem.full[stage]), kBug == 14 ? 0 : parity);
    if (kBug == 15) ptx::mbarrier_arrive(empty);
    sum += smem.tile[stage][c ^ 1];
    if (kBug != 15 && (kBug != 16 || c != 5)) ptx::mbarrier_arrive(empty);
  }
  smem.results[c] = sum;
  if (kBug != 17) ptx::fence_proxy_async();
  if (kBug != 18) ptx::barrier_sync(1, kConsumers);
  if (c == 0) {
    ptx::bulk_store(out, ptx::shared_address(smem.results), sizeof(smem.results));
    ptx::bulk_commit();
    if (kBug != 19 && kBug != 20) ptx::bulk_wait_read<0>();
    if (kBug == 20) {
      smem.results[3] = 0;
      ptx::bulk_wait_read<0>();
    }
  }
}

template <int kBug>
const char* pipeline() {
  Memory<int> in(kTiles * kConsumers, "in"), out(kConsumers, "out");
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i);
  const LaunchShape shape{dim3(1), dim3(kThreads), sizeof(Pipeline)};
  const char* error = finish(launch(pipeline_kernel<kBug>, shape, nullptr, in.get(), out.get()));
  return error ? error : expect(out, [](int i) { return kTiles * (i ^ 1) + kConsumers * 10; });
}

// Two tiles in flight by cp.async.
struct alignas(16) CopyTiles {
  int tile[2][4 * 32];
};

template <int kBug>
__global__ void copy_kernel(const int* in, int* out, int size) {
  CopyTiles& smem = shared_storage<CopyTiles>();
  const int t = threadIdx.x;
  int sum = 0;
  const auto load = [&](int i) {
    const int begin = (i * 32 + t) * 4, left = (size - begin) * 4;
    const int bytes = kBug == 5 ? 16 : left < 0 ? 0 : left < 16 ? left : 16;
    ptx::cp_async16(ptx::shared_address(&smem.tile[i % 2][4 * t]), bytes > 0 ? in + begin : in, bytes);
    ptx::cp_async_commit();
  };
  load(0);
  for (int i = 0; i < 3; ++i) {
    if (i + 1 < 3) {
      load(i + 1);
    } else {
      ptx::cp_async_commit();
    }
    if (kBug == 2) {
      ptx::cp_async_wait<2>();
    } else if (kBug != 1) {
      ptx::cp_async_wait<1>();
    }
    if (kBug != 3) __syncthreads();
    sum += smem.tile[i % 2][(4 * t + 5) % 128];
    if (kBug != 4) __syncthreads();
  }
  if (kBug == 6) load(0);
  out[t] = sum;
}

template <int kBug>
const char* copy() {
  const int size = 2 * 128 + 70;
  Memory<int> in(size, "in"), out(32, "out");
  for (int i = 0; i < size; ++i) in[i] = i;
  const LaunchShape shape{dim3(1), dim3(32), sizeof(CopyTiles)};
  const char* error = finish(launch(copy_kernel<kBug>, shape, nullptr, in.get(), out.get(), size));
  return error ? error : expect(out, [&](int t) {
    int sum = 0;
    for (int i = 0; i < 3; ++i) {
      const int place = 128 * i + (4 * t + 5) % 128;
      sum += place < size ? place : 0;
    }
    return sum;
  });
}

// A poll of an mbarrier that other threads arrive at.
struct Poll {
  alignas(8) uint64_t barrier;
  int value;
};

template <int kBug>
__global__ void poll_kernel(int* out) {
  Poll& smem = shared_storage<Poll>();
  const uint32_t barrier = ptx::shared_address(&smem.barrier);
  if (threadIdx.x == 0 && kBug != 2) ptx::mbarrier_init(barrier, 1);
  __syncthreads();
  if (threadIdx.x == 40) {
    smem.value = 7;
    ptx::mbarrier_arrive(barrier);
  }
  while (!ptx::mbarrier_test(barrier, 0)) {
    if (kBug == 1) break;
  }
  out[threadIdx.x] = smem.value;
  if (kBug == 3) {
    if (threadIdx.x == 0) ptx::mbarrier_invalidate(barrier);
    __syncthreads();
    ptx::mbarrier_arrive(barrier);
  }
}

template <int kBug>
const char* poll() {
  Memory<int> out(64, "out");
  const char* error = finish(launch(poll_kernel<kBug>, {dim3(1), dim3(64), sizeof(Poll)}, nullptr, out.get()));
  return error ? error : expect(out, [](int) { return 7; });
}

const Register all{
    {"pipeline", nullptr, pipeline<0>},
    {"pipeline: one arrival too many is expected", "deadlock: ", pipeline<1>},
    {"pipeline: one arrival too few is expected", "without order", pipeline<2>},
    {"pipeline: mbarriers initialised twice", "initialised already", pipeline<3>},
    {"pipeline: no fence after the initialisation", "missing fence.proxy.async", pipeline<4>},
    {"pipeline: no barrier after the initialisation", "mbarrier", pipeline<5>},
    {"pipeline: the producer does not wait", "all arrivals of the phase have happened", pipeline<6>},
    {"pipeline: the producer waits with the other parity", "deadlock: ", pipeline<7>},
    {"pipeline: too many bytes are expected", "deadlock: ", pipeline<8>},
    {"pipeline: misaligned destination", "misaligned: ", pipeline<9>},
    {"pipeline: a size that is no multiple of 16", "multiple of 16", pipeline<10>},
    {"pipeline: completes on no mbarrier", "out of bounds: bulk_load", pipeline<11>},
    {"pipeline: an mbarrier is overwritten", "mbarrier", pipeline<12>},
    {"pipeline: the consumers do not wait", "race: ", pipeline<13>},
    {"pipeline: the consumers forget the parity", "race: ", pipeline<14>},
    {"pipeline: the stage is released before it is read", "race: ", pipeline<15>},
    {"pipeline: a consumer does not release the stage", "deadlock: ", pipeline<16>},
    {"pipeline: no proxy fence before the bulk store", "missing fence.proxy.async", pipeline<17>},
    {"pipeline: no barrier before the bulk store", "race: ", pipeline<18>},
    {"pipeline: exit while the bulk store reads", "bulk store may still read", pipeline<19>},
    {"pipeline: write while the bulk store reads", "race: read, then write without order", pipeline<20>},
    {"cp.async", nullptr, copy<0>},
    {"cp.async: no wait", "cp.async is still writing", copy<1>},
    {"cp.async: wait for too few groups", "cp.async is still writing", copy<2>},
    {"cp.async: no barrier after the wait", "race: ", copy<3>},
    {"cp.async: no barrier before the next copy", "race: ", copy<4>},
    {"cp.async: read past the end", "out of bounds: cp_async", copy<5>},
    {"cp.async: exit with a copy in flight", "exits while its cp.async", copy<6>},
    {"poll", nullptr, poll<0>},
    {"poll: once only", "race: ", poll<1>},
    {"poll: no initialisation", "there is no mbarrier", poll<2>},
    {"poll: invalidated", "mbarrier", poll<3>},
};

}  // namespace
}  // namespace probe
