// The first product of SwiGLU experts on the GPU (Shazeer 2020, arXiv 2002.05202, equation 6): rows are picked from the
// tokens while they are copied, and gate and up of a channel meet in one thread, which writes the activation.
#include "core/grouped_product.cuh"
#include "moe_experts/moe_experts_gpu.h"

namespace arfast {
namespace {

// A tile has so many gate columns and the up columns of the same channels.
constexpr int kChannels = kProductTile / 2;

// Columns of the tile: 8 of gate, the same 8 of up, the next 8 of gate. Channels beyond the last one repeat it; nobody
// writes their columns.
template <typename T>
struct GateUpRows {
  static constexpr bool kInMemory = false;
  MatrixRows<T> rows;  // of an expert, [2 I, d]
  int first_channel, num_channels;

  __device__ int index(int column) const {
    const int channel = min(first_channel + column / 16 * 8 + column % 8, num_channels - 1);
    return column / 8 % 2 == 0 ? channel : num_channels + channel;
  }
};

template <typename T>
struct SwigluEpilogue {
  struct Smem {
    MatrixTile<T, kProductTile, kChannels> gate, up, activation;
  };
  T* h_row;  // the tile's first row of h, or nullptr
  MatrixRows<T> activation;
  int first_channel, num_channels, rows;

  __device__ void begin(Smem&) const {}

  template <int kCount>
  __device__ void add(Smem& smem, int row, int column, const float (&sums)[kCount][4]) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kCount; n += 2) {
        const int at = row + 8 * half + lane / 4, channel = column / 2 + 4 * n + 2 * (lane % 4);
        const float *gate = &sums[n][2 * half], *up = &sums[n + 1][2 * half];
        smem.activation.store_pair(at, channel, gate[0] * sigmoid(gate[0]) * up[0], gate[1] * sigmoid(gate[1]) * up[1]);
        if (h_row == nullptr) continue;
        smem.gate.store_pair(at, channel, gate[0], gate[1]);
        smem.up.store_pair(at, channel, up[0], up[1]);
      }
    }
  }

  template <int kRows>
  __device__ void end(const Smem& smem) const {
    const Segment mine = product_rows_of_warp<kRows>(rows);
    const int channels = min(num_channels - first_channel, kChannels);
    const auto write = [&](const auto& tile, const MatrixRows<T>& target) {
      tile.write_rows(target.from(mine.begin), mine.begin, mine.size(), channels);
    };
    write(smem.activation, activation);
    if (h_row == nullptr) return;
    write(smem.gate, {h_row + first_channel, 2 * num_channels});
    write(smem.up, {h_row + num_channels + first_channel, 2 * num_channels});
  }
};

template <typename T>
using GateUpShape = ProductShape<T, true, true, SwigluEpilogue<T>>;

template <typename T>
__global__ void __launch_bounds__(kProductThreads, 2) moe_gate_up_kernel(MoeGateUpParams params) {
  const MoeRows& shape = params.rows;
  const int d = static_cast<int>(shape.hidden_size), channels = static_cast<int>(shape.intermediate_size);
  const MatrixRows<T> hidden{static_cast<const T*>(params.hidden), static_cast<int>(params.hidden_stride)};
  const int tokens = static_cast<int>(shape.num_tokens);
  const auto tile_of = [&](const GroupTile& tile) {
    const int first_channel = tile.column / 2;
    const T* w_gate_up = static_cast<const T*>(params.w_gate_up) + tile.group * shape.intermediate_size * 2 * d;
    T* h = static_cast<T*>(params.h);
    const MatrixRows<T> activation{static_cast<const T*>(params.activation), channels};
    SwigluEpilogue<T> epilogue{h == nullptr ? nullptr : h + int64_t{tile.row} * 2 * channels,
                               {activation.at(tile.row) + first_channel, channels},
                               first_channel,
                               channels,
                               tile.rows};
    multiply_group_tile<GateUpShape<T>>(PickedRows<T>{hidden, tokens, shape.source_token + tile.row},
                                        GateUpRows<T>{{w_gate_up, d}, first_channel, channels}, tile.rows, kProductTile,
                                        d, epilogue);
  };
  for_each_group_tile(shape.offsets, shape.num_experts, shape.num_rows, 2 * channels, tile_of);
}

}  // namespace

const char* moe_gate_up_cuda(const MoeGateUpParams& params, void* stream) {
  if (const char* error = refused(params.rows)) return error;
  return dispatch_tensor_core_dtype(params.rows.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_group_tiles<GateUpShape<T>>(moe_gate_up_kernel<T>, params.rows.num_rows, params.rows.num_experts,
                                              2 * params.rows.intermediate_size, params, stream);
  });
}

}  // namespace arfast
