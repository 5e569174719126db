// Loss and gradient of rows that are read once, while the next ones are on the way.
//
// Clusters stay and take row after row. A block's part of a row arrives by a bulk copy in one stage of a ring in shared
// memory; its threads copy their vectors to registers and free the stage, which at once takes a later row. So memory is
// busy while the blocks of a cluster exchange their statistics: every warp sends its own to all blocks, and every warp
// adds all of them up in the same order. The exponentials are taken once more, from the registers, for the gradient.
#include "core/runtime.cuh"
#include "cross_entropy/row_results.cuh"

namespace arfast {
namespace {

template <int kThreads>
struct Smem {
  static constexpr int kWarps = kThreads / kWarpSize;
  uint4 stages[kRingMinStages * kThreads * kHeldVectors];
  RowStatistics of_warps[2][kRingMaxBlocks * kWarps];  // of the cluster's warps, in turn for one row and the next
  int64_t targets[kRingMaxStages];                     // of the rows in the stages
  uint64_t full[kRingMaxStages];                       // a stage's logits and target have arrived
  uint64_t empty[kRingMaxStages];                      // every warp is done with a stage
  uint64_t exchanged[2];                               // all of of_warps has arrived
  CrossEntropyTotals totals;                           // here, since waiting for a cluster empties the L1 cache
};

// Which vectors of a row a block takes, and which of them the bulk copy brings: the whole ones. What the first and the
// last vector hold of other rows is not read, since another cluster may be writing it.
struct Part {
  int first, last;
  int copied_first, copied_last;

  template <typename T>
  __device__ Part(const RowOf<const T>& in, int rank, int vectors) {
    const int size = static_cast<int>(in.num_vectors());
    first = min(rank * vectors, size);
    last = min(first + vectors, size);
    copied_first = max(first, in.column(0) < 0 ? 1 : 0);
    copied_last = max(copied_first, min(last, in.column(size) > in.size() ? size - 1 : size));
  }
};

// A block of a cluster with its ring. Stages, and slots of of_warps, are named by the caller.
template <typename T, int kThreads>
struct Ring {
  static constexpr int kWarps = kThreads / kWarpSize;
  using Held = HeldVectors<T, kThreads>;

  const CrossEntropyParams& params;
  const RingShape& shape;
  Smem<kThreads>& smem;
  int rank, lane, warp;

  __device__ Ring(const CrossEntropyParams& all_params, const RingShape& ring_shape)
      : params(all_params), shape(ring_shape), smem(shared_storage<Smem<kThreads>>()) {
    rank = static_cast<int>(blockIdx.x) % shape.blocks;
    lane = threadIdx.x % kWarpSize;
    warp = threadIdx.x / kWarpSize;
    if (threadIdx.x == 0) {
      for (int s = 0; s < shape.stages; ++s) {
        ptx::mbarrier_init(ptx::shared_address(&smem.full[s]), 1);
        ptx::mbarrier_init(ptx::shared_address(&smem.empty[s]), kWarps);
      }
      for (uint64_t& exchanged : smem.exchanged) ptx::mbarrier_init(ptx::shared_address(&exchanged), shape.blocks);
      ptx::fence_mbarrier_init();
      smem.totals = *params.totals;
    }
    ptx::cluster_sync();
  }

  __device__ RowOf<const T> logits(int64_t row) const {
    return {static_cast<const T*>(params.logits) + row * params.logits_stride, params.vocab_size};
  }
  __device__ Part part_of(const RowOf<const T>& in) const { return {in, rank, shape.part_vectors}; }

  // By one thread. A row without a loss takes its turn too, with nothing to copy.
  __device__ void fill(int stage, int64_t row, int64_t target) const {
    smem.targets[stage] = target;
    const uint32_t full = ptx::shared_address(&smem.full[stage]);
    float instead;
    if (!row_counts(params, target, &instead)) return ptx::mbarrier_arrive(full);
    const RowOf<const T> in = logits(row);
    const Part part = part_of(in);
    const uint32_t bytes = 16 * (part.copied_last - part.copied_first);
    ptx::mbarrier_arrive_expect_tx(full, bytes);
    if (bytes == 0) return;
    const uint4* place = &smem.stages[stage * shape.part_vectors + part.copied_first - part.first];
    ptx::bulk_load(ptx::shared_address(place), in.vector(part.copied_first), bytes, full);
  }

  // The thread's vectors of a part that has arrived; those at the ends of a row, which may be no whole ones, from where
  // they are.
  __device__ void take(int stage, const RowOf<const T>& in, const Part& part, Held& mine) const {
    const uint4* arrived = &smem.stages[stage * shape.part_vectors];
    mine.for_each([&](Vector16<T>& vector, int j) {
      const bool copied = j >= part.copied_first && j < part.copied_last;
      if (copied) vector = reinterpret_cast<const Vector16<T>&>(arrived[j - part.first]);
    });
    if (mine.first < part.copied_first) mine.vectors[0] = in.load(mine.first);
    const int tail = part.copied_last;
    if (tail >= part.last || (tail - mine.first) % kThreads != 0) return;
    const Vector16<T> of_tail = in.load(tail);
    mine.for_each([&](Vector16<T>& vector, int j) { vector = j == tail ? of_tail : vector; });
  }

  // By every warp, of what it read of the stage. It also is done with the statistics of the row before.
  __device__ void release(int stage) const {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&smem.empty[stage]));
  }

  // A warp's statistics go to all blocks of the cluster.
  __device__ void send(const RowStatistics& of_warp, int slot) const {
    if (lane >= shape.blocks) return;
    const uint32_t place = ptx::shared_address(&smem.of_warps[slot][rank * kWarps + warp]);
    const uint4 value = make_uint4(__float_as_uint(of_warp.max), __float_as_uint(of_warp.sum),
                                   __float_as_uint(of_warp.shifted), __float_as_uint(of_warp.weight));
    ptx::store_async(ptx::map_to_rank(place, lane), value,
                     ptx::map_to_rank(ptx::shared_address(&smem.exchanged[slot]), lane));
  }

  // By the first warp, once all have released this row's stage: the block no longer reads the other slot. A block that
  // has heard so from all, and has this row's statistics, may send the next row's there.
  __device__ void allow_next(int slot) const {
    const uint32_t exchanged = ptx::shared_address(&smem.exchanged[slot]);
    if (lane == rank) {
      ptx::mbarrier_arrive_expect_tx(exchanged, shape.blocks * kWarps * sizeof(RowStatistics));
    } else if (lane < shape.blocks) {
      ptx::mbarrier_arrive_remote_shared(ptx::map_to_rank(exchanged, lane));
    }
  }

  __device__ RowStatistics receive(int slot, uint32_t parity) const {
    ptx::mbarrier_wait_cluster(ptx::shared_address(&smem.exchanged[slot]), parity);
    return combine_entries(smem.of_warps[slot], shape.blocks * kWarps);
  }
};

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    cross_entropy_ring_kernel(CrossEntropyParams params, RingShape shape) {
  const Ring<T, kThreads> ring(params, shape);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t cluster = blockIdx.x / shape.blocks, clusters = gridDim.x / shape.blocks;
  if (const int64_t row = cluster + thread * clusters; thread < shape.stages && row < params.num_rows) {
    ring.fill(thread, row, params.targets[row]);
  }
  int stage = 0, exchanges = 0;
  uint32_t parity = 0;  // of the stage's barriers
  for (int64_t row = cluster; row < params.num_rows; row += clusters) {
    const int64_t later = row + shape.stages * clusters;  // takes this row's stage
    int64_t later_target = 0;
    if (thread == 0 && later < params.num_rows) later_target = params.targets[later];
    ptx::mbarrier_wait(ptx::shared_address(&ring.smem.full[stage]), parity);
    const int64_t target = ring.smem.targets[stage];
    float instead;
    const bool counts = row_counts(params, target, &instead);
    const RowOf<const T> in = ring.logits(row);
    const Part part = ring.part_of(in);
    HeldVectors<T, kThreads> mine{part.first + thread, counts ? part.last : 0};
    if (counts) ring.take(stage, in, part, mine);
    ring.release(stage);

    TargetLogit of_target;
    const RowStatistics statistics = held_statistics(params, in, target, mine, of_target);
    const int slot = exchanges % 2;
    if (counts) ring.send(combine_warp(statistics), slot);
    if (ring.warp == 0) {
      ptx::mbarrier_wait(ptx::shared_address(&ring.smem.empty[stage]), parity);
      if (counts) ring.allow_next(slot);
      if (thread == 0 && later < params.num_rows) ring.fill(stage, later, later_target);
    }
    if (++stage == shape.stages) stage = 0, parity ^= 1;

    if (!counts) {
      const int first = ring.rank * kThreads + thread;
      if (first == 0) write_row(params, row, instead, instead, 0, instead);
      if (params.dlogits != nullptr) fill_gradient<T>(params, row, first, shape.blocks * kThreads, instead);
      continue;
    }
    const RowStatistics all = ring.receive(slot, exchanges++ / 2 % 2);
    finish_target(params, row, all, target, of_target);
    if (params.dlogits == nullptr) continue;
    const RowGradient<T> gradient(params, ring.smem.totals, row, target, all);
    mine.for_each([&](const Vector16<T>& logits, int j) { gradient.store(logits, in.column(j)); });
  }
}

template <typename T, int kThreads>
RingLaunch launch_ring(const CrossEntropyParams& params, const RingShape& shape, void* stream) {
  const auto kernel = cross_entropy_ring_kernel<T, kThreads>;
  if (kernel_capability(kernel) < 90) return {false, nullptr};
  LaunchShape launched{dim3(1), dim3(kThreads), sizeof(Smem<kThreads>)};
  launched.cluster = shape.blocks;
  const int64_t resident = resident_clusters(kernel, launched);
  if (resident == 0) return {false, nullptr};
  launched.grid.x = static_cast<unsigned>(shape.blocks * (params.num_rows < resident ? params.num_rows : resident));
  return {true, launch(kernel, launched, stream, params, shape)};
}

template <typename T>
RingLaunch launch_largest(const CrossEntropyParams& params, int largest_cluster, void* stream) {
  const RingShape shape = ring_shape(longest_row_vectors(params, Vector16<T>::kSize), largest_cluster);
  if (shape.blocks == 0) return {false, nullptr};
  if (shape.threads == 256) return launch_ring<T, 256>(params, shape, stream);
  return launch_ring<T, 512>(params, shape, stream);
}

}  // namespace

RingLaunch cross_entropy_ring(const CrossEntropyParams& params, void* stream) {
  RingLaunch result{};
  const char* error = dispatch_gpu_dtype(params.dtype, [&](auto tag) -> const char* {
    using T = typename decltype(tag)::type;
    result = launch_largest<T>(params, kRingMaxBlocks, stream);
    if (!result.launched) result = launch_largest<T>(params, kRingMaxBlocks / 2, stream);
    return nullptr;
  });
  return error != nullptr ? RingLaunch{true, error} : result;
}

}  // namespace arfast
