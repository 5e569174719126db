// Probes of what threads of one block share: barriers, shared memory, warp collectives, atomic operations.
#include "emulator/probes/probe.h"

namespace probe {
namespace {

constexpr int kThreads = 128;

struct Rounds {
  int values[kThreads];
  int guard[4];
};

// Each round, every thread publishes a value and reads that of a thread of another warp.
template <int kBug>
__global__ void rounds_kernel(int* out) {
  Rounds& smem = shared_storage<Rounds>();
  const int t = threadIdx.x, partner = t ^ 33;
  int* const values = smem.values;
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    if (kBug == 5 && t == 7) return;
    if (kBug != 4 || t != 9) smem.values[kBug == 3 && t == 5 ? 4 : t] = t + round;
    if (kBug != 1) __syncthreads();
    sum += smem.values[partner];
    if (kBug != 2) __syncthreads();
  }
  if (kBug == 6 && t == 0) sum += values[kThreads + 4];
  if (kBug == 7 && t == 0) values[kThreads + 4] = 1;
  if (kBug == 8 && t == 0) sum += reinterpret_cast<const int2*>(&values[1])->x;
  out[t] = sum;
}

template <int kBug>
const char* rounds() {
  Memory<int> out(kThreads, "out");
  const size_t bytes = sizeof(Rounds);
  const char* error = finish(launch(rounds_kernel<kBug>, {dim3(1), dim3(kThreads), bytes}, nullptr, out.get()));
  return error ? error : expect(out, [](int i) { return 3 * (i ^ 33) + 3; });
}

// A barrier that not all threads reach.
template <int kBug>
__global__ void divergent_kernel(int* out) {
  if (threadIdx.x >= 96) return;  // threads that have exited do not count
  if (kBug == 0 || threadIdx.x < 64) __syncthreads();
  if (kBug == 1 && threadIdx.x >= 64) ptx::barrier_sync(1, 96);
  out[threadIdx.x] = 1;
}

template <int kBug>
const char* divergent() {
  Memory<int> out(kThreads, "out");
  const char* error = finish(launch(divergent_kernel<kBug>, {dim3(1), dim3(kThreads), 64}, nullptr, out.get()));
  return error ? error : expect(out, [](int i) { return i < 96; });
}

// A histogram by atomic operations on shared memory.
struct Histogram {
  int bins[8];
};

template <int kBug>
__global__ void histogram_kernel(int* out) {
  Histogram& smem = shared_storage<Histogram>();
  const int t = threadIdx.x;
  if (t < 8 && kBug != 4) smem.bins[t] = 0;
  if (kBug != 1) __syncthreads();
  if (kBug == 2) {
    smem.bins[t % 8] += 1;
  } else {
    atomicAdd(&smem.bins[t % 8], 1);
  }
  if (kBug != 3) __syncthreads();
  if (t < 8) out[t] = smem.bins[t];
}

template <int kBug>
const char* histogram() {
  Memory<int> out(8, "out");
  const LaunchShape shape{dim3(1), dim3(kThreads), sizeof(Histogram)};
  const char* error = finish(launch(histogram_kernel<kBug>, shape, nullptr, out.get()));
  return error ? error : expect(out, [](int) { return kThreads / 8; });
}

// Exchange inside a warp through shared memory.
template <int kBug>
__global__ void warp_exchange_kernel(int* out) {
  Rounds& smem = shared_storage<Rounds>();
  const int lane = threadIdx.x;
  smem.values[lane] = 10 * lane;
  if (kBug == 0) __syncwarp();
  if (kBug == 2) __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  if (kBug == 3) __shfl_sync(0xffffffffu, lane, 0);  // does not order memory
  out[lane] = smem.values[31 - lane];
}

template <int kBug>
const char* warp_exchange() {
  Memory<int> out(32, "out");
  const size_t bytes = sizeof(Rounds);
  const char* error = finish(launch(warp_exchange_kernel<kBug>, {dim3(1), dim3(32), bytes}, nullptr, out.get()));
  return error ? error : expect(out, [](int i) { return 10 * (31 - i); });
}

// Warp collectives in branches.
template <int kBug>
__global__ void warp_branch_kernel(int* out) {
  const int lane = threadIdx.x;
  const unsigned lower = 0x0000ffffu, upper = 0xffff0000u;
  int value;
  if (lane < 16) {
    value = __shfl_xor_sync(kBug == 1 ? 0xffffffffu : lower, lane, 1);
    out[32 + lane] = 0;
  } else if (kBug == 1) {
    value = __shfl_xor_sync(0xffffffffu, lane, 1);
    out[32 + lane] = value - value / 64;
  } else if (kBug == 2) {
    value = __shfl_xor_sync(lower, lane, 1);
  } else if (kBug == 3) {
    value = __shfl_sync(upper, lane, (lane ^ 1) - 16);
  } else {
    value = __shfl_xor_sync(upper, lane, 1);
  }
  if (kBug == 4) {
    if (lane == 3) {
      __ballot_sync(0xffffffffu, 1);
    } else {
      __reduce_add_sync(0xffffffffu, 1u);
    }
  }
  out[lane] = value;
}

template <int kBug>
const char* warp_branch() {
  Memory<int> out(64, "out");
  const char* error = finish(launch(warp_branch_kernel<kBug>, {dim3(1), dim3(32)}, nullptr, out.get()));
  return error ? error : expect(out, [](int i) { return i < 32 ? i ^ 1 : 0; });
}

// A scratch array that is reused: the sum over warps, twice.
template <int kBug>
__global__ void scratch_kernel(float* out) {
  Rounds& smem = shared_storage<Rounds>();
  const int warp = threadIdx.x / 32;
  float total = 0;
  for (int round = 0; round < 2; ++round) {
    if (kBug == 0 && round > 0) __syncthreads();
    if (threadIdx.x % 32 == 0) smem.values[warp] = warp + round;
    __syncthreads();
    for (int i = 0; i < kThreads / 32; ++i) total += static_cast<float>(smem.values[i]);
  }
  out[threadIdx.x] = total;
}

template <int kBug>
const char* scratch() {
  Memory<float> out(kThreads, "out");
  const size_t bytes = sizeof(Rounds);
  const char* error = finish(launch(scratch_kernel<kBug>, {dim3(1), dim3(kThreads), bytes}, nullptr, out.get()));
  return error ? error : expect(out, [](int) { return 6.0f + 10.0f; });
}

// Local memory and arithmetic.
template <int kBug>
__global__ void local_kernel(int* out, int index, int shift) {
  int values[4] = {1, 2, 3, 4};
  values[kBug == 1 ? index + 3 : index] += 10;
  out[threadIdx.x] = values[index] + (1 << (kBug == 2 ? shift + 31 : shift));
}

template <int kBug>
const char* local() {
  Memory<int> out(32, "out");
  const char* error = finish(launch(local_kernel<kBug>, {dim3(1), dim3(32)}, nullptr, out.get(), 1, 2));
  return error ? error : expect(out, [](int) { return 12 + 4; });
}

// Named barriers: two warps hand values over in turns.
template <int kBug>
__global__ void named_kernel(int* out) {
  Rounds& smem = shared_storage<Rounds>();
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x < 32) {
      if (i > 0 && kBug != 1) ptx::barrier_sync(2, 64);
      smem.values[lane] = 100 * i + lane;
      if (kBug != 2 || i != 2) ptx::barrier_arrive(1, kBug == 3 ? 96 : 64);
    } else {
      ptx::barrier_sync(1, 64);
      out[32 * i + lane] = smem.values[31 - lane];
      if (i < 3 && kBug != 1) ptx::barrier_arrive(2, 64);
    }
  }
}

template <int kBug>
const char* named() {
  Memory<int> out(128, "out");
  const char* error = finish(launch(named_kernel<kBug>, {dim3(1), dim3(64), sizeof(Rounds)}, nullptr, out.get()));
  return error ? error : expect(out, [](int i) { return 100 * (i / 32) + 31 - i % 32; });
}

const Register all{
    {"rounds", nullptr, rounds<0>},
    {"rounds: no barrier before reading", "race: write, then read without order", rounds<1>},
    {"rounds: no barrier before the next round", "race: ", rounds<2>},
    {"rounds: two threads write one value", "race: two writes without order", rounds<3>},
    {"rounds: a value is never written", "uninitialised shared memory", rounds<4>},
    {"rounds: one thread leaves", "uninitialised shared memory", rounds<5>},
    {"rounds: read past the end of shared memory", "out of bounds: ", rounds<6>},
    {"rounds: write past the end of shared memory", "out of bounds: ", rounds<7>},
    {"rounds: misaligned vector", "misaligned: ", rounds<8>},
    {"divergent", nullptr, divergent<0>},
    {"divergent: a warp waits elsewhere", "deadlock: ", divergent<1>},
    {"histogram", nullptr, histogram<0>},
    {"histogram: no barrier after the zeros", "race: ", histogram<1>},
    {"histogram: plain increments", "race: ", histogram<2>},
    {"histogram: no barrier before the result", "race: ", histogram<3>},
    {"histogram: no zeros", "uninitialised shared memory", histogram<4>},
    {"warp exchange", nullptr, warp_exchange<0>},
    {"warp exchange: no __syncwarp", "race: write, then read without order", warp_exchange<1>},
    {"warp exchange: __syncwarp of half a warp", "race: write, then read without order", warp_exchange<2>},
    {"warp exchange: a shuffle for a __syncwarp", "race: write, then read without order", warp_exchange<3>},
    {"warp branch", nullptr, warp_branch<0>},
    {"warp branch: full mask in both branches", "divergence: ", warp_branch<1>},
    {"warp branch: mask without the caller", "not in the mask", warp_branch<2>},
    {"warp branch: a lane that is not there", "does not take part", warp_branch<3>},
    {"warp branch: two collectives", "mismatch: ", warp_branch<4>},
    {"scratch", nullptr, scratch<0>},
    {"scratch: no barrier before the reuse", "race: ", scratch<1>},
    {"local", nullptr, local<0>},
    {"local: index out of range", "out of bounds: index", local<1>},
    {"local: shift out of range", "shift by", local<2>},
    {"named barriers", nullptr, named<0>},
    {"named barriers: one direction is missing", "deadlock", named<1>},
    {"named barriers: one arrival is missing", "deadlock: ", named<2>},
    {"named barriers: numbers of threads disagree", "mismatch: barrier", named<3>},
};

}  // namespace
}  // namespace probe
