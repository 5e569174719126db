// The backward pass of rms_norm on the GPU: teams of threads keep a row in registers between its sum and its gradient,
// and a block adds up its rows' shares of dweight in registers. A second kernel adds the partial sums of the blocks in
// order: which rows a block has depends on the sizes alone, so the bits are the same on every GPU.
//
// Memory bound. Element moves, each of 2 or 4 bytes: 3 (dout, x -> dx), or 4 with dsum, for which torch's own norm
// needs an addition after it, together 6. A partial sum is written and read once for rows_per_partial elements, mostly
// in the L2 cache.
#include "core/runtime.cuh"
#include "rms_norm/rms_norm.h"
#include "rms_norm/team.cuh"

namespace arfast {
namespace {

constexpr int kReduceThreads = 512;

// One vector of what the gradient of a row is made of.
struct Gradient {
  uint4 dout, x, dsum;
};

// Adds dout * x * rstd to dweight; the sum of dout * x * weight.
template <typename T>
__device__ float add_products(const Gradient& of, const uint4& weight_bits, float rstd,
                              float (&dweight)[Vector16<T>::kSize]) {
  const Vector16<T> dout = from_bits<T>(of.dout), x = from_bits<T>(of.x), weight = from_bits<T>(weight_bits);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) {
    const float dout_x = to_float(dout.elements[i]) * to_float(x.elements[i]);
    sum += dout_x * to_float(weight.elements[i]);
    dweight[i] += dout_x * rstd;
  }
  return sum;
}

template <typename T>
__device__ Vector16<T> gradient_of(const Gradient& of, const uint4& weight_bits, float rstd, float slope) {
  const Vector16<T> dout = from_bits<T>(of.dout), x = from_bits<T>(of.x), dsum = from_bits<T>(of.dsum);
  const Vector16<T> weight = from_bits<T>(weight_bits);
  Vector16<T> dx;
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) {
    const float g = to_float(dout.elements[i]) * to_float(weight.elements[i]);
    dx.elements[i] = from_float<T>((g - to_float(x.elements[i]) * slope) * rstd + to_float(dsum.elements[i]));
  }
  return dx;
}

template <typename T, typename Team>
struct BackwardSmem : TeamSmem {
  // By team and column: only teams that share a block add up.
  float dweight[Team::kPerBlock][Team::kPerBlock > 1 ? Team::kSize * Team::kHeld * Vector16<T>::kSize : 1];
};

// dx = rstd * (g - x * rstd^2 * mean(g * x)) + dsum with g = dout * weight, and the block's partial sums of
// dweight = dout * x * rstd. Teams take the rows of the block in turn, always the same ones.
template <typename T, typename Team>
__global__ void __launch_bounds__(kRmsNormThreads, Team::kHeld < 4 && !Team::kHasRest ? 3 : 2)
    rms_norm_backward_kernel(RmsNormBackwardParams params) {
  constexpr int kVector = Vector16<T>::kSize;
  auto& smem = shared_storage<BackwardSmem<T, Team>>();
  const int team = threadIdx.x / Team::kSize;
  const int64_t size = params.hidden_size, begin = blockIdx.x * params.rows_per_partial;
  const int64_t end = min(begin + params.rows_per_partial, params.num_rows);
  const RowOf<const T> weight = row_of<const T>(params.weight, 0, 0, size);
  const RowOf<float> partial = row_of<float>(params.partials, blockIdx.x, size, size);

  Gradient held[Team::kHeld];
  uint4 scale[Team::kHeld];
  float dweight[Team::kHeld][kVector] = {};
  const Columns<T, Team> all{size};
  all.held([&](int k, int64_t column) { scale[k] = weight.bits_at(column, 0); });
  // Four would not fit the registers: they come from the L1 cache.
  const auto scale_of = [&](int k, int64_t column) { return Team::kHeld < 4 ? scale[k] : weight.bits_at(column, 0); };
  for (int64_t first = begin; first < end; first += Team::kPerBlock) {
    const int64_t row = first + team;
    const Columns<T, Team> mine{row < end ? size : 0};
    const RowOf<const T> dout = row_of<const T>(params.dout, row, params.dout_stride, size);
    const RowOf<const T> x = row_of<const T>(params.x, row, params.x_stride, size);
    const RowOf<const T> dsum = row_of<const T>(params.dsum, row, params.dsum_stride, size);
    const RowOf<T> dx = row_of<T>(params.dx, row, size, size);
    const float rstd = row < end ? params.rstd[row] : 0.0f;
    const auto read = [&](int64_t column) {
      const uint4 dsum_bits = params.dsum != nullptr ? dsum.bits_at(column, 0) : uint4{};
      return Gradient{dout.bits_at(column, 0), x.bits_at(column, 0), dsum_bits};
    };
    mine.held([&](int k, int64_t column) { held[k] = read(column); });
    float products = 0;
    mine.held(
        [&](int k, int64_t column) { products += add_products<T>(held[k], scale_of(k, column), rstd, dweight[k]); });
    mine.rest([&](int64_t column) {  // of these columns, the partial sums wait in memory
      float so_far[kVector] = {};
      if (first > begin) load_floats(partial, column, so_far);
      products += add_products<T>(read(column), weight.bits_at(column, 0), rstd, so_far);
      store_floats(partial, column, so_far);
    });
    const float slope = team_sum<Team>(products, smem) / static_cast<float>(size) * rstd * rstd;
    mine.held([&](int k, int64_t column) {
      dx.store_cached(column, gradient_of<T>(held[k], scale_of(k, column), rstd, slope));
    });
    mine.rest([&](int64_t column) {
      dx.store_cached(column, gradient_of<T>(read(column), weight.bits_at(column, 0), rstd, slope));
    });
  }

  if constexpr (Team::kPerBlock == 1) {
    all.held([&](int k, int64_t column) { store_floats(partial, column, dweight[k]); });
    return;
  }
  all.held([&](int k, int64_t column) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) smem.dweight[team][column + i] = dweight[k][i];
  });
  __syncthreads();
  for (int64_t column = threadIdx.x; column < size; column += kRmsNormThreads) {
    float sum = 0;
#pragma unroll
    for (int other = 0; other < Team::kPerBlock; ++other) sum += smem.dweight[other][column];
    params.partials[blockIdx.x * size + column] = sum;
  }
}

struct ReduceSmem {
  float sums[kReduceThreads / kWarpSize][kWarpSize];
};

// dweight: a warp per 32 columns and part of the partial sums, then the parts in order.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads) rms_norm_dweight_kernel(RmsNormBackwardParams params, int64_t count) {
  constexpr int kWarps = kReduceThreads / kWarpSize;
  ReduceSmem& smem = shared_storage<ReduceSmem>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t column = blockIdx.x * int64_t{kWarpSize} + lane, size = params.hidden_size;
  float sum = 0;
#pragma unroll 8
  for (int64_t i = warp; column < size && i < count; i += kWarps) sum += params.partials[i * size + column];
  smem.sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= size) return;
  sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += smem.sums[i][lane];
  static_cast<T*>(params.dweight)[column] = from_float<T>(sum);
}

template <typename T>
const char* launch_backward(const RmsNormBackwardParams& params, void* stream) {
  const int64_t count = (params.num_rows + params.rows_per_partial - 1) / params.rows_per_partial;
  const char* error = with_team(vectors_of<T>(params.hidden_size), [&](auto team) {
    using Team = decltype(team);
    const LaunchShape shape{dim3(static_cast<unsigned>(count)), dim3(kRmsNormThreads), sizeof(BackwardSmem<T, Team>)};
    return launch(rms_norm_backward_kernel<T, Team>, shape, stream, params);
  });
  if (error != nullptr) return error;
  const int64_t blocks = (params.hidden_size + kWarpSize - 1) / kWarpSize;
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kReduceThreads), sizeof(ReduceSmem)};
  return launch(rms_norm_dweight_kernel<T>, shape, stream, params, count);
}

}  // namespace

const char* rms_norm_backward_cuda(const RmsNormBackwardParams& params, void* stream) {
  return dispatch_gpu_dtype(params.dtype,
                            [&](auto tag) { return launch_backward<typename decltype(tag)::type>(params, stream); });
}

}  // namespace arfast
