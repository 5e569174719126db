// Label-smoothed cross-entropy on the GPU (Szegedy et al. 2015, arXiv 1512.00567, section 7; z-loss: de Brebisson and
// Vincent 2016, arXiv 1604.08859; online statistics: Milakov and Gimelshein 2018, arXiv 1805.02867).
//
// With the gradient, a row is read once and its gradient written once: it waits in the registers of one block, or of a
// cluster of blocks that exchange their statistics through distributed shared memory. A row too long for that is read
// twice, by the two kernels that also serve alone: statistics without a gradient, and the gradient from statistics.
#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "core/rows.cuh"
#include "core/runtime.cuh"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/row_statistics.cuh"

namespace arfast {
namespace {

constexpr int kHeldVectors = 8;  // 16-byte vectors of a row that a thread keeps in registers

struct Smem {
  RowStatistics of_warps[kWarpSize];
  RowStatistics of_block;
};

// What the gradient of a row needs beside its logits.
struct GradientScales {
  float max;          // of z'
  float probability;  // of exp(z' - max)
  float uniform;      // of the class weights
  float target;       // subtracted at the target
};

__device__ GradientScales gradient_scales(const CrossEntropyParams& params, int64_t row, float max, float sum,
                                          float lse, float target_weight) {
  const float eps = static_cast<float>(params.label_smoothing);
  const float upstream = params.row_scale != nullptr ? params.row_scale[row] : 1.0f;
  const float ce_scale = static_cast<float>(params.totals->ce_scale) * upstream;
  const float per_class = eps / static_cast<float>(params.vocab_size);
  const float on_probability =
      ce_scale * ((1 - eps) * target_weight + per_class * static_cast<float>(params.totals->weight_sum)) +
      static_cast<float>(params.totals->z_scale) * upstream * 2 * static_cast<float>(params.z_loss) * lse;
  return {max, on_probability / sum, ce_scale * per_class, ce_scale * (1 - eps) * target_weight};
}

// The gradient of one vector of logits. The column of the target is corrected in float, before the only rounding.
template <typename T>
__device__ Vector16<T> gradient_of(const CrossEntropyParams& params, const Vector16<T>& logits, int64_t first_column,
                                   int64_t target, const GradientScales& scales) {
  const float cap = static_cast<float>(params.softcap);
  Vector16<T> out;
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) {
    const int64_t column = first_column + i;
    const float z = capped(to_float(logits.elements[i]), cap);
    const bool inside = column >= 0 && column < params.vocab_size;
    const float weight = params.weight != nullptr && inside ? params.weight[column] : 1.0f;
    float gradient = exp_approx(z - scales.max) * scales.probability - scales.uniform * weight;
    if (column == target) gradient -= scales.target;
    if (cap > 0) gradient *= 1 - (z / cap) * (z / cap);
    out.elements[i] = from_float<T>(gradient);
  }
  return out;
}

// Ignored rows have a gradient of zero; those with a target that is no class, of NaN: it shows, and nothing waits.
template <typename T>
__device__ void fill_gradient(const CrossEntropyParams& params, int64_t row, int64_t first, int64_t step, float value) {
  const RowOf<T> out(static_cast<T*>(params.dlogits) + row * params.dlogits_stride, params.vocab_size);
  const Vector16<T> filled = filled_with<T>(value);
  for (int64_t j = first; j < out.num_vectors(); j += step) out.store(out.column(j), filled);
}

__device__ void write_row(const CrossEntropyParams& params, int64_t row, float ce, float z, float max, float log_sum) {
  params.ce[row] = ce;
  params.z[row] = z;
  params.statistics[2 * row] = max;
  params.statistics[2 * row + 1] = log_sum;
}

// Whether the row has a loss; if not, what its gradient and its loss are.
__device__ bool row_counts(const CrossEntropyParams& params, int64_t target, float* instead) {
  *instead = target == params.ignore_index ? 0.0f : __uint_as_float(0x7fc00000u);
  return target >= 0 && target < params.vocab_size && target != params.ignore_index;
}

// The losses of a row from its statistics, by one thread.
__device__ void finish_row(const CrossEntropyParams& params, int64_t row, const RowStatistics& all, float z_target,
                           float target_weight) {
  const float eps = static_cast<float>(params.label_smoothing);
  const float log_sum = logf(all.sum), lse = all.max + log_sum;
  float loss = 0;
  // eps == 1 must not turn an infinite logit of the target into NaN, nor eps == 0 one elsewhere.
  if (eps < 1) loss += (1 - eps) * target_weight * (all.max - z_target + log_sum);
  if (eps > 0) loss += eps / static_cast<float>(params.vocab_size) * all.smoothing_loss(log_sum);
  write_row(params, row, loss, static_cast<float>(params.z_loss) * lse * lse, all.max, log_sum);
}

// Loss, statistics and gradient of a row by a cluster of blocks, each with its part of the row in registers.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    cross_entropy_row_kernel(CrossEntropyParams params, int blocks) {
  Smem& smem = shared_storage<Smem>();
  const int rank = static_cast<int>(blockIdx.x) % blocks;
  const int64_t row = blockIdx.x / blocks;
  const int64_t first = int64_t{rank} * kThreads + threadIdx.x, step = int64_t{blocks} * kThreads;
  const int64_t target = params.targets[row];
  float instead;
  if (!row_counts(params, target, &instead)) {
    if (first == 0) write_row(params, row, instead, instead, 0, instead);
    return fill_gradient<T>(params, row, first, step, instead);
  }
  const T* logits = static_cast<const T*>(params.logits) + row * params.logits_stride;
  const RowOf<const T> in(logits, params.vocab_size);
  const float cap = static_cast<float>(params.softcap);
  const float z_target = capped(to_float(logits[target]), cap);  // before the gradient may overwrite it

  Vector16<T> held[kHeldVectors];
#pragma unroll
  for (int k = 0; k < kHeldVectors; ++k) {
    if (first + k * step < in.num_vectors()) held[k] = in.load(first + k * step);
  }
  RowStatistics mine;
#pragma unroll
  for (int k = 0; k < kHeldVectors; ++k) {
    if (first + k * step < in.num_vectors()) add_vector(params, held[k], in.column(first + k * step), cap, mine);
  }
  RowStatistics all = combine_block<kThreads>(mine, smem.of_warps);
  if (blocks > 1) {
    if (threadIdx.x == 0) smem.of_block = all;
    ptx::cluster_sync();
    all = combine_cluster(&smem.of_block, blocks);
    ptx::cluster_arrive();  // no block may end while another one reads its shared memory
  }

  const float target_weight = params.weight != nullptr ? params.weight[target] : 1.0f;
  if (first == 0) finish_row(params, row, all, z_target, target_weight);
  const float lse = all.max + logf(all.sum);
  const GradientScales scales = gradient_scales(params, row, all.max, all.sum, lse, target_weight);
  const RowOf<T> out(static_cast<T*>(params.dlogits) + row * params.dlogits_stride, params.vocab_size);
#pragma unroll
  for (int k = 0; k < kHeldVectors; ++k) {
    const int64_t j = first + k * step;
    if (j < in.num_vectors()) {
      const int64_t column = in.column(j);
      out.store(column, gradient_of(params, held[k], column, target, scales));
    }
  }
  if (blocks > 1) ptx::cluster_wait();
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
  const float cap = static_cast<float>(params.softcap);
  RowStatistics mine;
  for (int64_t j = threadIdx.x; j < in.num_vectors(); j += kThreads) {
    add_vector(params, in.load(j), in.column(j), cap, mine);
  }
  const RowStatistics all = combine_block<kThreads>(mine, smem.of_warps);
  if (threadIdx.x != 0) return;
  const float target_weight = params.weight != nullptr ? params.weight[target] : 1.0f;
  finish_row(params, row, all, capped(to_float(logits[target]), cap), target_weight);
}

// The gradient from statistics: blocks over parts of rows.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) cross_entropy_gradient_kernel(CrossEntropyParams params) {
  const int64_t row = blockIdx.x, target = params.targets[row];
  const int64_t first = blockIdx.y * int64_t{kThreads} + threadIdx.x, step = int64_t{gridDim.y} * kThreads;
  float instead;
  if (!row_counts(params, target, &instead)) return fill_gradient<T>(params, row, first, step, instead);
  const RowOf<const T> in(static_cast<const T*>(params.logits) + row * params.logits_stride, params.vocab_size);
  const RowOf<T> out(static_cast<T*>(params.dlogits) + row * params.dlogits_stride, params.vocab_size);
  const float max = params.statistics[2 * row], log_sum = params.statistics[2 * row + 1];
  const float target_weight = params.weight != nullptr ? params.weight[target] : 1.0f;
  const GradientScales scales = gradient_scales(params, row, max, expf(log_sum), max + log_sum, target_weight);
  for (int64_t j = first; j < in.num_vectors(); j += step) {
    out.store(in.column(j), gradient_of(params, in.load(j), in.column(j), target, scales));
  }
}

// Blocks of kThreads per row of at most `vectors` vectors, or 0 when the row does not fit their registers.
template <int kThreads>
int blocks_per_row(int64_t vectors, int largest) {
  for (int blocks = 1; blocks <= largest; blocks *= 2) {
    if (vectors <= int64_t{blocks} * kThreads * kHeldVectors) return blocks;
  }
  return 0;
}

template <typename T, int kThreads>
const char* launch_rows(const CrossEntropyParams& params, int blocks, void* stream) {
  LaunchShape shape{dim3(static_cast<unsigned>(params.num_rows * blocks)), dim3(kThreads), sizeof(Smem)};
  shape.cluster = blocks;
  return launch(cross_entropy_row_kernel<T, kThreads>, shape, stream, params, blocks);
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
  if (params.ce != nullptr && params.dlogits != nullptr) {
    const int largest = kernel_capability(cross_entropy_row_kernel<T, 256>) >= 90 ? 8 : 1;
    const int64_t vectors = params.vocab_size / Vector16<T>::kSize + 2;
    if (const int blocks = blocks_per_row<256>(vectors, largest)) return launch_rows<T, 256>(params, blocks, stream);
    if (const int blocks = blocks_per_row<512>(vectors, largest)) return launch_rows<T, 512>(params, blocks, stream);
  }
  return launch_two_passes<T>(params, stream);
}

}  // namespace

const char* cross_entropy_cuda(const CrossEntropyParams& params, void* stream) {
  if (params.num_rows > 0x7fffffff / 8) return "N must be below 2^28";
  return dispatch_gpu_dtype(
      params.dtype, [&](auto tag) { return launch_cross_entropy<typename decltype(tag)::type>(params, stream); });
}

}  // namespace arfast
