// Probes of what blocks share: global memory, fences, semaphores, kernels that begin before the one before them ends.
#include "emulator/probes/probe.h"

namespace probe {
namespace {

constexpr int kBlocks = 6, kThreads = 64;

// The block that finishes last adds the sums of all.
struct LastBlock {
  unsigned last;
};

template <int kBug>
__global__ void last_block_kernel(const int* in, int* sums, unsigned* finished, int* out) {
  LastBlock& smem = shared_storage<LastBlock>();
  const int t = threadIdx.x, block = blockIdx.x;
  sums[block * kThreads + t] = 2 * in[block * kThreads + t];
  if (kBug == 4) sums[(block + 1) % kBlocks * kThreads + t] = 0;
  if (kBug != 2) __syncthreads();
  if (t == 0) {
    if (kBug != 1) __threadfence();
    smem.last = kBug == 3 ? block == 3 : atomicAdd(finished, 1u) == gridDim.x - 1;
    if (kBug != 5) __threadfence();
  }
  __syncthreads();
  if (smem.last == 0) return;
  int total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += sums[i * kThreads + t];
  out[t] = total;
}

template <int kBug>
const char* last_block() {
  Memory<int> in(kBlocks * kThreads, "in"), sums(in.size(), "sums"), out(kThreads, "out");
  Memory<unsigned> finished(1, "finished");
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i);
  const LaunchShape shape{dim3(kBlocks), dim3(kThreads), sizeof(LastBlock)};
  const char* error =
      finish(launch(last_block_kernel<kBug>, shape, nullptr, in.get(), sums.get(), finished.get(), out.get()));
  return error ? error : expect(out, [](int i) { return 2 * (kBlocks * i + kThreads * 15); });
}

// Each block adds to the result of the one before it, in the order of tickets.
struct Turn {
  unsigned ticket;
};

template <int kBug>
__global__ void turns_kernel(int* total, uint32_t* tickets, uint32_t* turn) {
  Turn& smem = shared_storage<Turn>();
  if (threadIdx.x == 0) {
    smem.ticket = ptx::add_acquire_release(tickets, 1);
    while (ptx::load_acquire(turn) != smem.ticket + (kBug == 3 ? 1 : 0)) {
      if (kBug == 1) break;
    }
  }
  if (kBug != 4) __syncthreads();
  total[threadIdx.x] += static_cast<int>(smem.ticket) + 1;
  if (kBug != 2) __syncthreads();
  if (threadIdx.x == 0) ptx::store_release(turn, smem.ticket + 1);
}

template <int kBug>
const char* turns() {
  Memory<int> total(kThreads, "total");
  Memory<uint32_t> tickets(1, "tickets"), turn(1, "turn");
  const LaunchShape shape{dim3(kBlocks), dim3(kThreads), sizeof(Turn)};
  const char* error = finish(launch(turns_kernel<kBug>, shape, nullptr, total.get(), tickets.get(), turn.get()));
  return error ? error : expect(total, [](int) { return kBlocks * (kBlocks + 1) / 2; });
}

// All blocks wait for all others: they must run at the same time.
template <int kBug>
__global__ void meeting_kernel(int* values, uint32_t* arrived, int* out) {
  if (threadIdx.x == 0) {
    values[blockIdx.x] = 10 * static_cast<int>(blockIdx.x);
    if (kBug == 1) {
      atomicAdd(arrived, 1u);
    } else {
      ptx::add_acquire_release(arrived, 1);
    }
    const unsigned all = kBug == 2 ? gridDim.x + 1 : gridDim.x;
    while (ptx::load_acquire(arrived) < all) {
    }
    out[blockIdx.x] = values[(blockIdx.x + 1) % gridDim.x];
  }
}

template <int kBug>
const char* meeting() {
  Memory<int> values(kBlocks, "values"), out(kBlocks, "out");
  Memory<uint32_t> arrived(1, "arrived");
  const char* error =
      finish(launch(meeting_kernel<kBug>, {dim3(kBlocks), dim3(32)}, nullptr, values.get(), arrived.get(), out.get()));
  return error ? error : expect(out, [](int i) { return 10 * ((i + 1) % kBlocks); });
}

// Which global memory is accessed.
template <int kBug>
__global__ void bounds_kernel(const float* in, float* out, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kBug == 5 ? i <= size : i < size) {
    if (kBug == 1) {
      out[i] = in[i + 1];
    } else if (kBug == 2) {
      out[i - 1] = in[i];
    } else if (kBug == 3) {
      out[i] = reinterpret_cast<const float4*>(in + (i & 3))->x;
    } else if (kBug == 4) {
      out[i / 2] = in[i];
    } else {
      out[i] = in[i];
    }
  }
}

template <int kBug>
const char* bounds() {
  const int size = 50;
  Memory<float> in(size, "in"), out(size, "out");
  for (int i = 0; i < size; ++i) in[i] = static_cast<float>(i);
  const char* error = finish(launch(bounds_kernel<kBug>, {dim3(2), dim3(32)}, nullptr, in.get(), out.get(), size));
  return error ? error : expect(out, [](int i) { return static_cast<float>(i); });
}

template <int kBug>
__global__ void stray_kernel(int* out) {
  int* stray = out + (kBug == 1 ? (1 << 24) : 0);
  stray[threadIdx.x] = static_cast<int>(threadIdx.x);
}

template <int kBug>
const char* stray() {
  Memory<int> out(32, "out");
  const char* error = finish(launch(stray_kernel<kBug>, {dim3(1), dim3(32)}, nullptr, out.get()));
  return error ? error : expect(out, [](int i) { return i; });
}

// A kernel that may begin before the one before it ends.
template <int kBug>
__global__ void first_kernel(int* values) {
  if (kBug == 0 || kBug == 1) ptx::grid_dependency_launch();
  values[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
}
template <int kBug>
__global__ void second_kernel(const int* values, int* out) {
  if (kBug == 2) {
    if (threadIdx.x == 0) ptx::grid_dependency_wait();
    __syncwarp();
  } else if (kBug != 1) {
    ptx::grid_dependency_wait();
  }
  out[threadIdx.x] = values[threadIdx.x];
}

template <int kBug>
const char* dependent() {
  Memory<int> values(kThreads, "values"), out(kThreads, "out");
  const char* error = finish(launch(first_kernel<kBug>, {dim3(1), dim3(kThreads)}, nullptr, values.get()));
  const LaunchShape second{dim3(1), dim3(kThreads), 0, 1, true};
  if (error == nullptr) error = finish(launch(second_kernel<kBug>, second, nullptr, values.get(), out.get()));
  return error ? error : expect(out, [](int i) { return i + 1; });
}

const Register all{
    {"last block", nullptr, last_block<0>},
    {"last block: no fence", "race: ", last_block<1>},
    {"last block: no barrier before the fence", "race: ", last_block<2>},
    {"last block: any block", "race: ", last_block<3>},
    {"last block: writes over another block's sums", "race: two writes", last_block<4>},
    {"last block: no fence after the count", nullptr, last_block<5>},  // reported with strict_acquire
    {"turns", nullptr, turns<0>},
    {"turns: nobody waits", "race: ", turns<1>},
    {"turns: no barrier before the release", "race: ", turns<2>},
    {"turns: a turn that never comes", "deadlock: ", turns<3>},
    {"turns: no barrier after the wait", "race: ", turns<4>},
    {"meeting", nullptr, meeting<0>},
    {"meeting: relaxed arrival", "race: ", meeting<1>},
    {"meeting: one arrival too many is expected", "deadlock: ", meeting<2>},
    {"bounds", nullptr, bounds<0>},
    {"bounds: read past the end", "out of bounds: read of 4 bytes", bounds<1>},
    {"bounds: write before the begin", "out of bounds: write of 4 bytes", bounds<2>},
    {"bounds: misaligned vector", "misaligned: ", bounds<3>},
    {"bounds: two threads write one element", "race: two writes without order", bounds<4>},
    {"bounds: off by one", "out of bounds: ", bounds<5>},
    {"stray", nullptr, stray<0>},
    {"stray: far away", "unregistered memory: ", stray<1>},
    {"dependent launch", nullptr, dependent<0>},
    {"dependent launch: no wait", "race: ", dependent<1>},
    {"dependent launch: one thread waits, no barrier for the other warp", "race: ", dependent<2>},
};

}  // namespace
}  // namespace probe
