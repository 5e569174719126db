// Probes of clusters: distributed shared memory, st.async, remote arrivals, the cluster's barrier.
#include "emulator/probes/probe.h"

namespace probe {
namespace {

constexpr int kBlocks = 4, kThreads = 64;

struct alignas(16) Ring {
  uint2 values[kThreads];
  alignas(8) uint64_t full;
};

// Every block sends its values to the next one of the cluster.
template <int kBug>
__global__ void ring_kernel(unsigned* out) {
  Ring& smem = shared_storage<Ring>();
  const unsigned t = threadIdx.x, rank = ptx::cluster_rank();
  const uint32_t full = ptx::shared_address(&smem.full);
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(full, kBug == 3 ? sizeof(smem.values) - 8 : sizeof(smem.values));
  }
  if (kBug == 1) {
    __syncthreads();
  } else if (kBug == 2) {
    ptx::cluster_arrive();
    ptx::cluster_arrive();
  } else {
    ptx::cluster_sync();
  }
  const unsigned next = kBug == 4 ? rank + 1 : (rank + 1) % kBlocks;
  const uint32_t target = ptx::map_to_rank(ptx::shared_address(&smem.values[kBug == 5 ? t / 2 : t]), next);
  const uint32_t bar = ptx::map_to_rank(full, kBug == 6 ? rank : next);
  ptx::store_async(target, make_uint2(100 * rank + t, t), bar);
  if (kBug == 9) {
    ptx::mbarrier_wait(full, 0);
  } else if (kBug != 7) {
    ptx::mbarrier_wait_cluster(full, 0);
  }
  if (kBug == 8 && rank == 0) {
    smem.values[t] = make_uint2(0, 0);
    ptx::mbarrier_arrive_remote(ptx::map_to_rank(full, 9));
  }
  out[blockIdx.x * kThreads + t] = smem.values[t].x + smem.values[t].y;
}

template <int kBug>
const char* ring() {
  Memory<unsigned> out(2 * kBlocks * kThreads, "out");
  const LaunchShape shape{dim3(2 * kBlocks), dim3(kThreads), sizeof(Ring), kBlocks};
  const char* error = finish(launch(ring_kernel<kBug>, shape, nullptr, out.get()));
  return error ? error : expect(out, [](unsigned i) {
    const unsigned rank = i / kThreads % kBlocks, t = i % kThreads;
    return 100 * ((rank + kBlocks - 1) % kBlocks) + 2 * t;
  });
}

struct Shared {
  unsigned values[kThreads];
  alignas(8) uint64_t ready;
  alignas(8) uint64_t read;
};

// Every block reads the values of all others.
template <int kBug>
__global__ void gather_kernel(unsigned* out) {
  Shared& smem = shared_storage<Shared>();
  const unsigned t = threadIdx.x, rank = ptx::cluster_rank();
  smem.values[t] = 10 * rank + t;
  if (kBug == 1) {
    __syncthreads();
  } else if (kBug == 3) {
    ptx::cluster_arrive();
  } else {
    ptx::cluster_sync();
  }
  unsigned sum = 0;
  for (unsigned r = 0; r < ptx::cluster_size(); ++r) {
    sum += ptx::load_remote(ptx::map_to_rank(ptx::shared_address(&smem.values[kBug == 4 ? t + 60 : t]), r));
  }
  if (kBug == 5) smem.values[t] = 0;
  out[blockIdx.x * kThreads + t] = sum;
  if (kBug != 2) ptx::cluster_sync();  // a block whose memory is read stays
}

template <int kBug>
const char* gather() {
  Memory<unsigned> out(kBlocks * kThreads, "out");
  const LaunchShape shape{dim3(kBlocks), dim3(kThreads), sizeof(Shared), kBlocks};
  const char* error = finish(launch(gather_kernel<kBug>, shape, nullptr, out.get()));
  return error ? error : expect(out, [](unsigned i) { return 60 + 4 * (i % kThreads); });
}

// Block 0 says to the others by remote arrivals that its values are ready, they say that they have read them.
template <int kBug>
__global__ void announce_kernel(unsigned* out) {
  Shared& smem = shared_storage<Shared>();
  const unsigned t = threadIdx.x, rank = ptx::cluster_rank(), others = ptx::cluster_size() - 1;
  const uint32_t ready = ptx::shared_address(&smem.ready), read = ptx::shared_address(&smem.read);
  if (t == 0) {
    ptx::mbarrier_init(ready, kBug == 1 ? 1 : kThreads);
    ptx::mbarrier_init(read, others);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  for (uint32_t round = 0; round < 2; ++round) {
    if (rank == 0) {
      if (round > 0 && kBug != 2) ptx::mbarrier_wait_cluster(read, 0);
      smem.values[t] = 1000 * round + t;
      for (unsigned r = 1; r <= others; ++r) ptx::mbarrier_arrive_remote(ptx::map_to_rank(ready, r));
    } else {
      if (kBug != 3) ptx::mbarrier_wait_cluster(ready, round);
      const unsigned place = ptx::map_to_rank(ptx::shared_address(&smem.values[t ^ 1]), 0);
      out[(round * kBlocks + rank) * kThreads + t] = ptx::load_remote(place);
      if (kBug != 4) __syncthreads();
      if (t == 0) ptx::mbarrier_arrive_remote(ptx::map_to_rank(read, 0));
    }
  }
  if (kBug != 5) ptx::cluster_sync();
}

template <int kBug>
const char* announce() {
  Memory<unsigned> out(2 * kBlocks * kThreads, "out");
  const LaunchShape shape{dim3(kBlocks), dim3(kThreads), sizeof(Shared), kBlocks};
  const char* error = finish(launch(announce_kernel<kBug>, shape, nullptr, out.get()));
  return error ? error : expect(out, [](unsigned i) {
    const unsigned round = i / (kBlocks * kThreads), rank = i / kThreads % kBlocks;
    return rank == 0 ? 0u : 1000 * round + (i % kThreads ^ 1);
  });
}

struct alignas(16) Slot {
  uint2 values[kThreads];
  alignas(8) uint64_t full;
  alignas(8) uint64_t read;
};

// Every block sends to the next one of the cluster, again and again to the same place: the receiver says when it may.
template <int kBug>
__global__ void relay_kernel(unsigned* out) {
  Slot& smem = shared_storage<Slot>();
  const unsigned t = threadIdx.x, rank = ptx::cluster_rank();
  const unsigned next = (rank + 1) % kBlocks, before = (rank + kBlocks - 1) % kBlocks;
  const uint32_t full = ptx::shared_address(&smem.full), read = ptx::shared_address(&smem.read);
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(read, kBug == 3 ? kThreads + 1 : kThreads);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  unsigned sum = 0;
  for (uint32_t round = 0; round < 3; ++round) {
    if (t == 0) ptx::mbarrier_arrive_expect_tx(full, sizeof(smem.values));
    if (round > 0 && kBug != 1) ptx::mbarrier_wait_cluster(read, (round - 1) % 2);
    const uint32_t place = ptx::map_to_rank(ptx::shared_address(&smem.values[t]), next);
    ptx::store_async(place, make_uint2(100 * rank + round, t), ptx::map_to_rank(full, next));
    ptx::mbarrier_wait_cluster(full, round % 2);
    if (kBug == 2) ptx::mbarrier_arrive_remote_shared(ptx::map_to_rank(read, before));
    sum += smem.values[t ^ 1].x + smem.values[t ^ 1].y;
    if (kBug != 2) ptx::mbarrier_arrive_remote_shared(ptx::map_to_rank(read, before));
  }
  out[blockIdx.x * kThreads + t] = sum;
  ptx::cluster_sync();  // the last arrivals find their block
}

template <int kBug>
const char* relay() {
  Memory<unsigned> out(kBlocks * kThreads, "out");
  const LaunchShape shape{dim3(kBlocks), dim3(kThreads), sizeof(Slot), kBlocks};
  const char* error = finish(launch(relay_kernel<kBug>, shape, nullptr, out.get()));
  return error ? error : expect(out, [](unsigned i) {
    const unsigned rank = i / kThreads, t = i % kThreads;
    return 3 * (100 * ((rank + kBlocks - 1) % kBlocks) + (t ^ 1)) + 3;
  });
}

const Register all{
    {"ring", nullptr, ring<0>},
    {"ring: the cluster does not meet first", "mbarrier", ring<1>},
    {"ring: arrives twice", "cluster_arrive twice", ring<2>},
    {"ring: too few bytes are expected", "while copies to the block's shared memory", ring<3>},
    {"ring: no such rank", "map_to_rank", ring<4>},
    {"ring: two threads send to one place", "race: two writes without order", ring<5>},
    {"ring: value and mbarrier in two blocks", "in two blocks", ring<6>},
    {"ring: nobody waits", "uninitialised shared memory", ring<7>},
    {"ring: arrives beyond the cluster", "map_to_rank", ring<8>},
    {"ring: waits for its own block only", "mbarrier_wait_cluster", ring<9>},
    {"gather", nullptr, gather<0>},
    {"gather: a block's barrier for the cluster's", "without order", gather<1>},
    {"gather: exit while others read", "has exited", gather<2>},
    {"gather: arrives and does not wait", "uninitialised shared memory", gather<3>},
    {"gather: out of bounds", "out of bounds: ", gather<4>},
    {"gather: writes while others read", "race: ", gather<5>},
    {"relay", nullptr, relay<0>},
    {"relay: does not wait for the reader", "race: ", relay<1>},
    {"relay: the reader says so too early", "race: ", relay<2>},
    {"relay: one arrival too many is expected", "deadlock", relay<3>},
    {"announce", nullptr, announce<0>},
    {"announce: wrong number of arrivals", "deadlock", announce<1>},
    {"announce: does not wait for the readers", "deadlock", announce<2>},
    {"announce: the readers do not wait", "race: ", announce<3>},
    {"announce: the readers say so too early", "race: ", announce<4>},
    {"announce: exit while others read", "has exited", announce<5>},
};

}  // namespace
}  // namespace probe
