// Root mean square normalisation on the GPU (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4). A team of threads,
// from half a warp to a block, takes a row and keeps it in registers from its statistics to its output; of a row too
// long for that, the rest is read twice.
//
// Memory bound. Element moves, each of 2 or 4 bytes: 2 (x -> out), with a residual 4 (x, residual -> sum, out). torch's
// own norm needs the addition as a kernel before it, together 5; spelled out in torch operations, the norm moves some
// 36 bytes per element of bfloat16 (to float32, square, mean, scale, to bfloat16, weight) for 4 here.
#include "core/runtime.cuh"
#include "rms_norm/rms_norm.h"
#include "rms_norm/team.cuh"

namespace arfast {
namespace {

template <typename T>
__device__ Vector16<T> sum_of(const uint4& a_bits, const uint4& b_bits) {
  Vector16<T> a = from_bits<T>(a_bits);
  const Vector16<T> b = from_bits<T>(b_bits);
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) {
    a.elements[i] = from_float<T>(to_float(a.elements[i]) + to_float(b.elements[i]));
  }
  return a;
}

template <typename T>
__device__ float sum_of_squares(const uint4& bits) {
  const Vector16<T> x = from_bits<T>(bits);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) sum += to_float(x.elements[i]) * to_float(x.elements[i]);
  return sum;
}

template <typename T>
__device__ Vector16<T> normalised(const uint4& bits, float rstd, const uint4& weight_bits) {
  Vector16<T> x = from_bits<T>(bits);
  const Vector16<T> weight = from_bits<T>(weight_bits);
#pragma unroll
  for (int i = 0; i < Vector16<T>::kSize; ++i) {
    x.elements[i] = from_float<T>(to_float(x.elements[i]) * rstd * to_float(weight.elements[i]));
  }
  return x;
}

template <typename T, typename Team>
__global__ void __launch_bounds__(kRmsNormThreads) rms_norm_forward_kernel(RmsNormForwardParams params) {
  TeamSmem& smem = shared_storage<TeamSmem>();
  const int64_t row = blockIdx.x * int64_t{Team::kPerBlock} + threadIdx.x / Team::kSize;
  const int64_t size = params.hidden_size;
  const Columns<T, Team> mine{row < params.num_rows ? size : 0};
  const bool adds = params.residual != nullptr;
  const RowOf<const T> x = row_of<const T>(params.x, row, params.x_stride, size);
  const RowOf<const T> residual = row_of<const T>(params.residual, row, params.residual_stride, size);
  const RowOf<const T> weight = row_of<const T>(params.weight, 0, 0, size);
  const RowOf<T> sum = row_of<T>(params.sum, row, size, size), out = row_of<T>(params.out, row, size, size);

  uint4 held[Team::kHeld], added[Team::kHeld], scale[Team::kHeld];
  mine.held([&](int k, int64_t column) {
    held[k] = x.bits_at(column, 0);
    if (adds) added[k] = residual.bits_at(column, 0);
    scale[k] = weight.bits_at(column, 0);
  });
  // The rounded sum is what the next layers and the backward pass see.
  const auto add = [&](int64_t column, const uint4& a, const uint4& b) {
    const Vector16<T> total = sum_of<T>(a, b);
    sum.store_cached(column, total);
    return to_bits(total);
  };
  float squares = 0;
  mine.held([&](int k, int64_t column) {
    if (adds) held[k] = add(column, held[k], added[k]);
    squares += sum_of_squares<T>(held[k]);
  });
  mine.rest([&](int64_t column) {
    const uint4 read = x.bits_at(column, 0);
    squares += sum_of_squares<T>(adds ? add(column, read, residual.bits_at(column, 0)) : read);
  });
  const float mean = team_sum<Team>(squares, smem) / static_cast<float>(size);
  const float rstd = rsqrtf(mean + static_cast<float>(params.eps));
  if (mine.size > 0 && threadIdx.x % Team::kSize == 0) params.rstd[row] = rstd;
  mine.held([&](int k, int64_t column) { out.store_cached(column, normalised<T>(held[k], rstd, scale[k])); });
  mine.rest([&](int64_t column) {  // of the sum, a thread reads back what it wrote
    const uint4 read = adds ? sum.bits_at(column, 0) : x.bits_at(column, 0);
    out.store_cached(column, normalised<T>(read, rstd, weight.bits_at(column, 0)));
  });
}

template <typename T>
const char* launch_forward(const RmsNormForwardParams& params, void* stream) {
  return with_team(vectors_of<T>(params.hidden_size), [&](auto team) {
    using Team = decltype(team);
    const int64_t blocks = (params.num_rows + Team::kPerBlock - 1) / Team::kPerBlock;
    const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kRmsNormThreads), sizeof(TeamSmem)};
    return launch(rms_norm_forward_kernel<T, Team>, shape, stream, params);
  });
}

}  // namespace

const char* rms_norm_forward_cuda(const RmsNormForwardParams& params, void* stream) {
  if (params.num_rows > 0x7fffffff) return "N must be below 2^31";
  return dispatch_gpu_dtype(params.dtype,
                            [&](auto tag) { return launch_forward<typename decltype(tag)::type>(params, stream); });
}

}  // namespace arfast
