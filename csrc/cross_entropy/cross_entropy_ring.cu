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
  uint4 ring[kRingMinStages * kThreads * kHeldVectors];
  RowStatistics of_warps[2][kRingMaxBlocks * kWarps];  // of the cluster, in turn for one row and the next
  int64_t targets[kRingMaxStages];                     // of the rows in the stages
  uint64_t full[kRingMaxStages];                       // a stage's part and target have arrived
  uint64_t empty[kRingMaxStages];                      // every warp is done with a stage
  uint64_t exchanged[2];                               // all of of_warps has arrived
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
  __device__ bool copied(int j) const { return j >= copied_first && j < copied_last; }
};

template <typename T>
__device__ RowOf<const T> logits_of(const CrossEntropyParams& params, int64_t row) {
  return {static_cast<const T*>(params.logits) + row * params.logits_stride, params.vocab_size};
}

template <int kThreads>
__device__ void init_barriers(Smem<kThreads>& smem, const RingShape& shape) {
  for (int s = 0; s < shape.stages; ++s) {
    ptx::mbarrier_init(ptx::shared_address(&smem.full[s]), 1);
    ptx::mbarrier_init(ptx::shared_address(&smem.empty[s]), Smem<kThreads>::kWarps);
  }
  for (uint64_t& exchanged : smem.exchanged) ptx::mbarrier_init(ptx::shared_address(&exchanged), shape.blocks);
  ptx::fence_mbarrier_init();
}

// Sends for the block's part of a row, by one thread. A row without a loss takes its turn in the ring too, empty.
template <typename T, int kThreads>
__device__ void fill_stage(const CrossEntropyParams& params, const RingShape& shape, Smem<kThreads>& smem, int stage,
                           int64_t row, int64_t target, int rank) {
  smem.targets[stage] = target;
  const uint32_t full = ptx::shared_address(&smem.full[stage]);
  float instead;
  if (!row_counts(params, target, &instead)) return ptx::mbarrier_arrive(full);
  const RowOf<const T> in = logits_of<T>(params, row);
  const Part part(in, rank, shape.part_vectors);
  const uint32_t bytes = 16 * (part.copied_last - part.copied_first);
  ptx::mbarrier_arrive_expect_tx(full, bytes);
  if (bytes == 0) return;
  const uint4* place = &smem.ring[stage * shape.part_vectors + part.copied_first - part.first];
  ptx::bulk_load(ptx::shared_address(place), in.vector(part.copied_first), bytes, full);
}

// A warp's statistics go to all blocks of the cluster.
template <int kThreads>
__device__ void send(Smem<kThreads>& smem, const RowStatistics& of_warp, int slot, int rank, int blocks) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (lane >= blocks) return;
  const uint32_t place = ptx::shared_address(&smem.of_warps[slot][rank * Smem<kThreads>::kWarps + warp]);
  const uint4 value = make_uint4(__float_as_uint(of_warp.max), __float_as_uint(of_warp.sum),
                                 __float_as_uint(of_warp.shifted), __float_as_uint(of_warp.weight));
  ptx::store_async(ptx::map_to_rank(place, lane), value,
                   ptx::map_to_rank(ptx::shared_address(&smem.exchanged[slot]), lane));
}

// Says to all blocks of the cluster, by the first warp, that this one no longer reads the other slot: they may send the
// next row's statistics there once they have all of this row's.
template <int kThreads>
__device__ void allow_next(Smem<kThreads>& smem, int slot, int rank, int blocks) {
  const int lane = threadIdx.x;
  const uint32_t exchanged = ptx::shared_address(&smem.exchanged[slot]);
  if (lane == rank) {
    ptx::mbarrier_arrive_expect_tx(exchanged, blocks * Smem<kThreads>::kWarps * sizeof(RowStatistics));
  } else if (lane < blocks) {
    ptx::mbarrier_arrive_remote_shared(ptx::map_to_rank(exchanged, lane));
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    cross_entropy_ring_kernel(CrossEntropyParams params, RingShape shape) {
  Smem<kThreads>& smem = shared_storage<Smem<kThreads>>();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int rank = static_cast<int>(blockIdx.x) % shape.blocks;
  const int64_t cluster = blockIdx.x / shape.blocks, clusters = gridDim.x / shape.blocks;
  if (threadIdx.x == 0) init_barriers(smem, shape);
  ptx::cluster_sync();
  if (const int64_t row = cluster + threadIdx.x * clusters; threadIdx.x < shape.stages && row < params.num_rows) {
    fill_stage<T>(params, shape, smem, static_cast<int>(threadIdx.x), row, params.targets[row], rank);
  }

  int stage = 0, exchanges = 0;
  uint32_t parity = 0;  // of the stage's barriers
  for (int64_t row = cluster; row < params.num_rows; row += clusters) {
    const int64_t later = row + shape.stages * clusters;  // takes this row's stage
    int64_t later_target = 0;
    if (threadIdx.x == 0 && later < params.num_rows) later_target = params.targets[later];
    ptx::mbarrier_wait(ptx::shared_address(&smem.full[stage]), parity);
    const int64_t target = smem.targets[stage];
    float instead;
    const bool counts = row_counts(params, target, &instead);
    const int slot = exchanges % 2;

    const RowOf<const T> in = logits_of<T>(params, row);
    const Part part(in, rank, shape.part_vectors);
    HeldVectors<T, kThreads> mine{part.first + static_cast<int>(threadIdx.x), counts ? part.last : 0};
    const uint4* arrived = &smem.ring[stage * shape.part_vectors];
    mine.for_each([&](Vector16<T>& logits, int j) {
      logits = part.copied(j) ? reinterpret_cast<const Vector16<T>&>(arrived[j - part.first]) : in.load(j);
    });
    const uint32_t empty = ptx::shared_address(&smem.empty[stage]);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty);

    RowStatistics statistics;
    TargetLogit of_target;
    mine.for_each([&](const Vector16<T>& logits, int j) {
      add_vector(params, logits, in.column(j), statistics);
      of_target.look_in(logits, in.column(j), target);
    });
    if (counts) send(smem, combine_warp(statistics), slot, rank, shape.blocks);
    if (warp == 0) {
      ptx::mbarrier_wait(empty, parity);
      if (counts) allow_next(smem, slot, rank, shape.blocks);
      if (lane == 0 && later < params.num_rows) fill_stage<T>(params, shape, smem, stage, later, later_target, rank);
    }
    if (++stage == shape.stages) stage = 0, parity ^= 1;

    if (!counts) {
      const int first = rank * kThreads + static_cast<int>(threadIdx.x);
      if (first == 0) write_row(params, row, instead, instead, 0, instead);
      if (params.dlogits != nullptr) fill_gradient<T>(params, row, first, shape.blocks * kThreads, instead);
      continue;
    }
    ptx::mbarrier_wait_cluster(ptx::shared_address(&smem.exchanged[slot]), exchanges / 2 % 2);
    const RowStatistics all = combine_entries(smem.of_warps[slot], shape.blocks * Smem<kThreads>::kWarps);
    ++exchanges;
    if (of_target.held) {
      finish_row(params, row, all, target, capped(of_target.z, static_cast<float>(params.softcap)));
    }
    if (params.dlogits == nullptr) continue;
    const GradientScales scales = gradient_scales(params, row, target, all.max, all.sum, logf(all.sum));
    const RowOf<T> out(static_cast<T*>(params.dlogits) + row * params.dlogits_stride, params.vocab_size);
    mine.for_each([&](const Vector16<T>& logits, int j) {
      out.store(in.column(j), gradient_of(params, logits, in.column(j), target, scales));
    });
  }
}

template <typename T, int kThreads>
RingLaunch launch_ring(const CrossEntropyParams& params, const RingShape& shape, void* stream) {
  const auto kernel = cross_entropy_ring_kernel<T, kThreads>;
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
