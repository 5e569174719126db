// The gradients of SwiGLU experts on the GPU (Shazeer 2020, arXiv 2002.05202, equation 6), but for the one plain
// product dh w_gate_up, which is grouped_mm's.
#include "core/grouped_product.cuh"
#include "moe_experts/moe_experts_gpu.h"

namespace arfast {
namespace {

// From da, the gradient of the activation before the expert's weight: dh, weight * activation and <da, activation>.
template <typename T>
struct SwigluBackwardEpilogue {
  struct Smem {
    MatrixTile<T, kProductTile, kProductTile> gate, up, weighted;  // gate and up give way to their gradients
    float dweight[kProductTile][2];                                // of the columns of each warp
    float weight[kProductTile];
  };
  const MoeDownBackwardParams& params;
  int first_row, rows, first_column, columns;

  __device__ int width() const { return static_cast<int>(params.rows.intermediate_size); }
  __device__ MatrixRows<T> of(const void* matrix, int64_t row_size, int column) const {
    return {static_cast<const T*>(matrix) + first_row * row_size + column, static_cast<int>(row_size)};
  }
  __device__ MatrixRows<T> gate_of(const void* h) const { return of(h, 2 * width(), first_column); }
  __device__ MatrixRows<T> up_of(const void* h) const { return of(h, 2 * width(), width() + first_column); }

  // The weight of a row: which choice of its token it is, `position` knows.
  __device__ float weight_of(int row) const {
    const int tokens = static_cast<int>(params.rows.num_tokens);
    const int64_t token = max(0, min(params.rows.source_token[row], tokens - 1));
    for (int64_t choice = token * params.top_k; choice < (token + 1) * params.top_k; ++choice) {
      if (params.position[choice] == row) return params.expert_weights[choice];
    }
    return 0;
  }

  __device__ void begin(Smem& smem) const {
    smem.gate.template load<kProductThreads>(gate_of(params.h), rows, columns);
    smem.up.template load<kProductThreads>(up_of(params.h), rows, columns);
    ptx::cp_async_commit();
    const int row = threadIdx.x;
    if (row < kProductTile) smem.weight[row] = row < rows ? weight_of(first_row + row) : 0.0f;
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  template <int kCount>
  __device__ void add(Smem& smem, int row, int column, const float (&sums)[kCount][4]) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 8 * half + lane / 4;
      const float weight = smem.weight[at];
      float dweight = 0;
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const int first = column + 8 * n + 2 * (lane % 4);
        const float2 gates = smem.gate.load_pair(at, first), ups = smem.up.load_pair(at, first);
        const float gate[2] = {gates.x, gates.y}, up[2] = {ups.x, ups.y};
        float dgate[2], dup[2], weighted[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float da = first + i < columns ? sums[n][2 * half + i] : 0.0f;  // beside them, Inf times 0
          const float s = sigmoid(gate[i]), silu = gate[i] * s;
          dweight += da * silu * up[i];
          dgate[i] = weight * da * up[i] * s * (1 + gate[i] * (1 - s));
          dup[i] = weight * da * silu;
          weighted[i] = weight * silu * up[i];
        }
        smem.gate.store_pair(at, first, dgate[0], dgate[1]);
        smem.up.store_pair(at, first, dup[0], dup[1]);
        smem.weighted.store_pair(at, first, weighted[0], weighted[1]);
      }
      dweight = warp_sum<4>(dweight);
      if (lane % 4 == 0) smem.dweight[at][column / ProductTiling<kProductTile>::kWarpColumns] = dweight;
    }
  }

  template <int kRows>
  __device__ void end(const Smem& smem) const {
    const Segment mine = product_rows_of_warp<kRows>(rows);
    const auto write = [&](const auto& tile, const MatrixRows<T>& target) {
      tile.write_rows(target.from(mine.begin), mine.begin, mine.size(), columns);
    };
    write(smem.gate, gate_of(params.dh));
    write(smem.up, up_of(params.dh));
    write(smem.weighted, of(params.weighted, width(), first_column));
    const int row = threadIdx.x;
    if (row >= rows) return;
    static_assert(kMoeColumnTile == kProductTile);
    const int64_t tiles = moe_column_tiles(width());
    params.partial_dweights[(first_row + row) * tiles + first_column / kProductTile] =
        smem.dweight[row][0] + smem.dweight[row][1];
  }
};

template <typename T>
using DownBackwardShape = ProductShape<T, true, false, SwigluBackwardEpilogue<T>>;

template <typename T>
__global__ void __launch_bounds__(kProductThreads, 2) moe_down_backward_kernel(MoeDownBackwardParams params) {
  const MoeRows& shape = params.rows;
  const int d = static_cast<int>(shape.hidden_size), width = static_cast<int>(shape.intermediate_size);
  const MatrixRows<T> dout{static_cast<const T*>(params.dout), static_cast<int>(params.dout_stride)};
  const int tokens = static_cast<int>(shape.num_tokens);
  const auto tile_of = [&](const GroupTile& tile) {
    const T* w_down = static_cast<const T*>(params.w_down) + tile.group * shape.hidden_size * width + tile.column;
    const int columns = min(width - tile.column, kProductTile);
    SwigluBackwardEpilogue<T> epilogue{params, tile.row, tile.rows, tile.column, columns};
    multiply_tile<DownBackwardShape<T>, kProductTile>(PickedRows<T>{dout, tokens, shape.source_token + tile.row},
                                                      DirectRows<T>{{w_down, width}}, tile.rows, columns, d, epilogue);
  };
  for_each_group_tile(shape.offsets, shape.num_experts, shape.num_rows, width, tile_of);
}

// dexpert_weights from the parts of the tiles, in their order. A thread per choice.
__global__ void __launch_bounds__(kProductThreads) moe_dweights_kernel(MoeDownBackwardParams params) {
  const int64_t choice = blockIdx.x * int64_t{kProductThreads} + threadIdx.x;
  if (choice >= params.rows.num_rows) return;
  const int64_t row = params.position[choice], tiles = moe_column_tiles(params.rows.intermediate_size);
  float sum = 0;
  if (row >= 0 && row < params.rows.num_rows) {
    for (int64_t tile = 0; tile < tiles; ++tile) sum += params.partial_dweights[row * tiles + tile];
  }
  params.dexpert_weights[choice] = sum;
}

template <typename T>
using WeightGradientShape = ProductShape<T, false, false, RoundingEpilogue<T>>;

template <typename T, bool kByToken>
__device__ auto rows_of_expert(const MoeRows& shape, const MatrixRows<T>& operand, int first_row) {
  if constexpr (kByToken) {
    return PickedRows<T>{operand, static_cast<int>(shape.num_tokens), shape.source_token + first_row};
  } else {
    return DirectRows<T>{operand.from(first_row)};
  }
}

template <typename T, bool kByTokenA>
__global__ void __launch_bounds__(kProductThreads, 2) moe_weight_gradient_kernel(MoeWeightGradientParams params) {
  const OutputTile tile(params.num_rows, params.num_columns);
  const Segment expert = segment_at(params.rows.offsets, tile.group, static_cast<int>(params.rows.num_rows));
  const MatrixRows<T> a{static_cast<const T*>(params.a) + tile.row, static_cast<int>(params.a_stride)},
      b{static_cast<const T*>(params.b) + tile.column, static_cast<int>(params.b_stride)},
      out{static_cast<const T*>(params.out) + tile.group * params.num_rows * params.num_columns + tile.column,
          static_cast<int>(params.num_columns)};
  RoundingEpilogue<T> epilogue{out.from(tile.row), tile.rows, tile.columns};
  multiply_tile<WeightGradientShape<T>, kProductTile>(rows_of_expert<T, kByTokenA>(params.rows, a, expert.begin),
                                                      rows_of_expert<T, !kByTokenA>(params.rows, b, expert.begin),
                                                      tile.rows, tile.columns, expert.size(), epilogue);
}

}  // namespace

const char* moe_down_backward_cuda(const MoeDownBackwardParams& params, void* stream) {
  if (const char* error = refused(params.rows)) return error;
  const char* error = dispatch_tensor_core_dtype(params.rows.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_group_tiles<DownBackwardShape<T>>(moe_down_backward_kernel<T>, params.rows.num_rows,
                                                    params.rows.num_experts, params.rows.intermediate_size, params,
                                                    stream);
  });
  const int64_t blocks = (params.rows.num_rows + kProductThreads - 1) / kProductThreads;
  if (error != nullptr || blocks == 0) return error;
  return launch(moe_dweights_kernel, LaunchShape{dim3(static_cast<unsigned>(blocks)), dim3(kProductThreads)}, stream,
                params);
}

const char* moe_weight_gradient_cuda(const MoeWeightGradientParams& params, void* stream) {
  if (const char* error = refused(params.rows)) return error;
  return dispatch_tensor_core_dtype(params.rows.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = params.a_by_token ? moe_weight_gradient_kernel<T, true> : moe_weight_gradient_kernel<T, false>;
    return launch_output_tiles<WeightGradientShape<T>>(kernel, params.rows.num_experts, params.num_rows,
                                                       params.num_columns, params, stream);
  });
}

}  // namespace arfast
