// Label-smoothed cross-entropy on the GPU (Szegedy et al. 2015, arXiv 1512.00567, section 7; z-loss: de Brebisson and
// Vincent 2016, arXiv 1604.08859; online statistics: Milakov and Gimelshein 2018, arXiv 1805.02867).
//
// With the gradient, a row is read once and its gradient written once: from sm_90 on by the ring of
// cross_entropy_ring.cu, which loads the next rows meanwhile; before, and where rows are short, by one block that keeps
// a row in registers or in shared memory. A row too long for that is read twice, by the two kernels that also serve
// alone: statistics without a gradient, and the gradient from statistics.
#include <algorithm>

#include "core/runtime.cuh"
#include "cross_entropy/ring.h"
#include "cross_entropy/row_results.cuh"

namespace arfast {
namespace {

struct Smem {
  RowStatistics of_warps[kWarpSize];
};

constexpr int kSharedThreads = 512;

struct SharedRow : Smem {
  uint4 vectors[10240];  // as many as the row has are there
};

constexpr int kRowThreads = 256;

// Loss, statistics and gradient of a row by one block, which keeps it in registers.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2) cross_entropy_row_kernel(CrossEntropyParams params) {
  Smem& smem = shared_storage<Smem>();
  const int64_t row = blockIdx.x, target = params.targets[row];
  float instead;
  if (!row_counts(params, target, &instead)) {
    if (threadIdx.x == 0) write_row(params, row, instead, instead, 0, instead);
    return fill_gradient<T>(params, row, threadIdx.x, kRowThreads, instead);
  }
  const RowOf<const T> in(static_cast<const T*>(params.logits) + row * params.logits_stride, params.vocab_size);
  HeldVectors<T, kRowThreads> mine{static_cast<int>(threadIdx.x), static_cast<int>(in.num_vectors())};
  mine.for_each([&](Vector16<T>& logits, int j) { logits = in.load(j); });
  TargetLogit of_target;
  const RowStatistics statistics = held_statistics(params, in, target, mine, of_target);
  const RowStatistics all = combine_block<kRowThreads>(statistics, smem.of_warps);

  finish_target(params, row, all, target, of_target);
  const RowGradient<T> gradient(params, *params.totals, row, target, all);
  mine.for_each([&](const Vector16<T>& logits, int j) { gradient.store(logits, in.column(j)); });
}

// The same by one block that keeps the row in shared memory.
template <typename T>
__global__ void __launch_bounds__(kSharedThreads, 2) cross_entropy_shared_row_kernel(CrossEntropyParams params) {
  SharedRow& smem = shared_storage<SharedRow>();
  const int64_t row = blockIdx.x, target = params.targets[row];
  float instead;
  if (!row_counts(params, target, &instead)) {
    if (threadIdx.x == 0) write_row(params, row, instead, instead, 0, instead);
    return fill_gradient<T>(params, row, threadIdx.x, kSharedThreads, instead);
  }
  const RowOf<const T> in(static_cast<const T*>(params.logits) + row * params.logits_stride, params.vocab_size);
  const int size = static_cast<int>(in.num_vectors()), half = (size / 2 / kSharedThreads + 1) * kSharedThreads;
  // A thread copies the vectors that it reads later: it waits for its own copies alone.
  const auto for_each = [&](int first, int last, const auto& f) {
    for (int j = first + static_cast<int>(threadIdx.x); j < last; j += kSharedThreads) {
      f(reinterpret_cast<Vector16<T>&>(smem.vectors[j]), j);
    }
  };
  const auto copy = [&](Vector16<T>& place, int j) {
    if (in.whole(j)) {
      ptx::cp_async16(ptx::shared_address(&place), in.vector(j));
    } else {
      place = in.load(j);
    }
  };
  for_each(0, half, copy);
  ptx::cp_async_commit();
  for_each(half, size, copy);
  ptx::cp_async_commit();
  RowStatistics statistics;
  TargetLogit of_target;
  const auto add = [&](const Vector16<T>& logits, int j) {
    add_vector(params, logits, in.column(j), statistics);
    of_target.look_in(logits, in.column(j), target);
  };
  ptx::cp_async_wait<1>();
  for_each(0, half, add);
  ptx::cp_async_wait<0>();
  for_each(half, size, add);
  const RowStatistics all = combine_block<kSharedThreads>(statistics, smem.of_warps);
  finish_target(params, row, all, target, of_target);
  const RowGradient<T> gradient(params, *params.totals, row, target, all);
  for_each(0, size, [&](const Vector16<T>& logits, int j) { gradient.store(logits, in.column(j)); });
}

// Loss and statistics of a row by one block.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) cross_entropy_statistics_kernel(CrossEntropyParams params) {
  Smem& smem = shared_storage<Smem>();
  const int64_t row = blockIdx.x, target = params.targets[row];
  float instead;
  if (!row_counts(params, target, &instead)) {
    if (threadIdx.x == 0) write_row(params, row, instead, instead, 0, instead);
    return;
  }
  const T* logits = static_cast<const T*>(params.logits) + row * params.logits_stride;
  const RowOf<const T> in(logits, params.vocab_size);
  RowStatistics mine;
  for (int64_t j = threadIdx.x; j < in.num_vectors(); j += kThreads) {
    add_vector(params, in.load(j), in.column(j), mine);
  }
  const RowStatistics all = combine_block<kThreads>(mine, smem.of_warps);
  if (threadIdx.x != 0) return;
  finish_row(params, row, all, target, capped(to_float(logits[target]), static_cast<float>(params.softcap)));
}

// The gradient from statistics: blocks over parts of rows.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) cross_entropy_gradient_kernel(CrossEntropyParams params) {
  const int64_t row = blockIdx.x, target = params.targets[row];
  const int64_t first = blockIdx.y * int64_t{kThreads} + threadIdx.x, step = int64_t{gridDim.y} * kThreads;
  float instead;
  if (!row_counts(params, target, &instead)) return fill_gradient<T>(params, row, first, step, instead);
  const RowOf<const T> in(static_cast<const T*>(params.logits) + row * params.logits_stride, params.vocab_size);
  const float max = params.statistics[2 * row], log_sum = params.statistics[2 * row + 1];
  const RowGradient<T> gradient(params, *params.totals, row, target, max, expf(log_sum), log_sum);
  for (int64_t j = first; j < in.num_vectors(); j += step) gradient.store(in.load(j), in.column(j));
}

template <typename T>
const char* launch_rows(const CrossEntropyParams& params, void* stream) {
  const dim3 rows(static_cast<unsigned>(params.num_rows));
  return launch(cross_entropy_row_kernel<T>, LaunchShape{rows, dim3(kRowThreads), sizeof(Smem)}, stream, params);
}

template <typename T>
const char* launch_shared_rows(const CrossEntropyParams& params, size_t shared_bytes, void* stream) {
  const dim3 rows(static_cast<unsigned>(params.num_rows));
  return launch(cross_entropy_shared_row_kernel<T>, LaunchShape{rows, dim3(kSharedThreads), shared_bytes}, stream,
                params);
}

template <typename T>
const char* launch_two_passes(const CrossEntropyParams& params, void* stream) {
  constexpr int kThreads = 512;
  const dim3 rows(static_cast<unsigned>(params.num_rows));
  if (params.ce != nullptr) {
    const char* error = launch(cross_entropy_statistics_kernel<T, kThreads>,
                               LaunchShape{rows, dim3(kThreads), sizeof(Smem)}, stream, params);
    if (error != nullptr || params.dlogits == nullptr) return error;
  }
  // In place too: every element is read by the thread that writes it.
  const int64_t vectors = params.vocab_size / Vector16<T>::kSize + 2;
  const int64_t parts = (vectors + kThreads * kHeldVectors - 1) / (kThreads * kHeldVectors);
  const dim3 grid(rows.x, static_cast<unsigned>(parts < 65535 ? parts : 65535));
  return launch(cross_entropy_gradient_kernel<T, kThreads>, LaunchShape{grid, dim3(kThreads), 0}, stream, params);
}

template <typename T>
const char* launch_cross_entropy(const CrossEntropyParams& params, void* stream) {
  const int64_t vectors = longest_row_vectors(params, Vector16<T>::kSize);
  if (params.ce != nullptr && params.dlogits != nullptr) {
    const size_t shared_bytes = sizeof(Smem) + vectors * sizeof(uint4);
    if (vectors <= kRowThreads * kHeldVectors) return launch_rows<T>(params, stream);
    if (shared_bytes <= std::min(sizeof(SharedRow), device_shared_bytes())) {
      return launch_shared_rows<T>(params, shared_bytes, stream);
    }
  }
  return launch_two_passes<T>(params, stream);
}

}  // namespace

const char* cross_entropy_cuda(const CrossEntropyParams& params, void* stream) {
  if (params.num_rows == 0) return nullptr;
  if (params.num_rows > 0x7fffffff) return "N must be below 2^31";
  if (params.ce != nullptr) {
    if (const RingLaunch ring = cross_entropy_ring(params, stream); ring.launched) return ring.error;
  }
  return dispatch_gpu_dtype(
      params.dtype, [&](auto tag) { return launch_cross_entropy<typename decltype(tag)::type>(params, stream); });
}

}  // namespace arfast
