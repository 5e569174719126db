// Probes of tensor maps: boxes of tensors with 2 to 4 dimensions, swizzled or not, inside and partly outside.
#include "core/tensor_map.cuh"
#include "emulator/probes/probe.h"

namespace probe {
namespace {

constexpr int kThreads = 64, kRows = 16;

// The box is loaded, its bytes in shared memory are written to `raw`, and it is stored to another tensor.
template <int kBug>
__global__ void box_kernel(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap out, int rank,
                           int bytes, int x, int y, int z, uint32_t* raw) {
  unsigned char* const smem = &shared_storage<unsigned char>();
  const uint32_t box = ptx::shared_address(smem), bar = box + bytes;
  const int t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (t == 0) {
    const uint32_t to = kBug == 1 ? box + 128 : box;
    ptx::mbarrier_arrive_expect_tx(bar, kBug == 2 ? bytes / 2 : bytes);
    if (rank == 2) {
      ptx::tensor_load(to, &in, bar, x, y);
    } else if (rank == 3) {
      ptx::tensor_load(to, &in, bar, x, y, z);
    } else {
      ptx::tensor_load(to, &in, bar, x, y, z, 0);
    }
  }
  if (kBug != 3) ptx::mbarrier_wait(bar, 0);
  for (int i = t; i < bytes / 4; i += kThreads) raw[i] = reinterpret_cast<const uint32_t*>(smem)[i];
  if (kBug == 4) reinterpret_cast<uint32_t*>(smem)[t] = 0;
  if (kBug == 4 || kBug == 5) __syncthreads();
  if (t == 0) {
    if (rank == 2) {
      ptx::tensor_store(&out, box, x, y);
    } else if (rank == 3) {
      ptx::tensor_store(&out, box, x, y, z);
    } else {
      ptx::tensor_store(&out, box, x, y, z, 0);
    }
    ptx::bulk_commit();
    if (kBug != 5) ptx::bulk_wait_read<0>();
  }
}

// 16-bit elements numbered in order; the tensor is [depth, 20, width].
template <int kBug, int kRank, int kSwizzle, int kX, int kY, int kZ>
const char* box() {
  const int span = kSwizzle > 0 ? kSwizzle : 96, columns = span / 2, planes = kRank > 2 ? 2 : 1;
  const int width = columns + 8, height = 20, depth = kRank > 2 ? 3 : 1, bytes = span * kRows * planes;
  Memory<uint16_t> in(width * height * depth, "in"), out(in.size(), "out");
  Memory<uint32_t> raw(bytes / 4, "raw");
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i + 1);
  TensorMapShape shape{};
  shape.rank = kRank;
  shape.swizzle_bytes = kSwizzle;
  const uint64_t sizes[4] = {uint64_t(width), uint64_t(height), uint64_t(depth), 1};
  const uint32_t sides[4] = {uint32_t(columns), kRows, uint32_t(planes), 1};
  for (int i = 0; i < kRank; ++i) {
    shape.sizes[i] = sizes[i];
    shape.box[i] = sides[i];
    if (i > 0) shape.strides[i - 1] = (i == 1 ? 1 : shape.strides[i - 2]) * sizes[i - 1] * (i == 1 ? 2 : 1);
  }
  CUtensorMap in_map, out_map;
  shape.base = in.get();
  const char* error = make_tensor_map(&in_map, shape, true);
  shape.base = out.get() + (kBug == 6 ? 4 : 0);
  if (error == nullptr) error = make_tensor_map(&out_map, shape, true);
  if (error == nullptr) {
    const LaunchShape launch_shape{dim3(1), dim3(kThreads), static_cast<size_t>(bytes) + 8};
    error = finish(launch(box_kernel<kBug>, launch_shape, nullptr, in_map, out_map, int{kRank}, bytes, int{kX}, int{kY},
                          int{kZ}, raw.get()));
  }
  if (error != nullptr) return error;
  const auto index = [&](int column, int row, int plane) {
    const int x = kX + column, y = kY + row, z = (kRank > 2 ? kZ : 0) + plane;
    const bool inside = x >= 0 && x < width && y >= 0 && y < height && z >= 0 && z < depth;
    return inside ? (z * height + y) * width + x : -1;
  };
  error = expect(raw, [&](int i) {
    // The 16-byte chunks of a row are exchanged by the row's number: chunk ^= row % 8, row / 2 % 4, row / 4 % 2.
    uint32_t packed = 0;
    for (int half = 0; half < 2; ++half) {
      const int line = i * 4 / span, byte = i * 4 % span + 2 * half;
      const int exchange = kSwizzle == 128  ? line % 8
                           : kSwizzle == 64 ? line / 2 % 4
                           : kSwizzle == 32 ? line / 4 % 2
                                            : 0;
      const int at = index(((byte / 16 ^ exchange) * 16 + byte % 16) / 2, line % kRows, line / kRows);
      packed |= uint32_t(at < 0 ? 0 : in[at]) << (16 * half);
    }
    return packed;
  });
  if (error != nullptr) return error;
  std::vector<bool> stored(in.size());
  for (int i = 0; i < columns * kRows * planes; ++i) {
    const int at = index(i % columns, i / columns % kRows, i / columns / kRows);
    if (at >= 0) stored[at] = true;
  }
  return expect(out, [&](int i) { return stored[i] ? in[i] : uint16_t{0}; });
}

const Register all{
    {"tensor 2d", nullptr, box<0, 2, 0, 0, 0, 0>},
    {"tensor 2d, swizzle 32", nullptr, box<0, 2, 32, 0, 0, 0>},
    {"tensor 2d, swizzle 64, partly outside", nullptr, box<0, 2, 64, -3, 8, 0>},
    {"tensor 2d, swizzle 128", nullptr, box<0, 2, 128, 4, 2, 0>},
    {"tensor 3d, partly outside", nullptr, box<0, 3, 0, 10, -5, 2>},
    {"tensor 3d, swizzle 128, partly outside", nullptr, box<0, 3, 128, -8, 7, -1>},
    {"tensor 4d, swizzle 64", nullptr, box<0, 4, 64, 0, 3, 1>},
    {"tensor 4d, swizzle 32, partly outside", nullptr, box<0, 4, 32, 9, 9, 2>},
    {"tensor: destination off the swizzle's repetition", "misaligned: tensor_load", box<1, 2, 128, 0, 0, 0>},
    {"tensor: too few bytes are expected", "deadlock", box<2, 2, 128, 0, 0, 0>},
    {"tensor: no wait", "uninitialised shared memory", box<3, 2, 128, 0, 0, 0>},
    {"tensor: no proxy fence before the store", "missing fence.proxy.async", box<4, 2, 128, 0, 0, 0>},
    {"tensor: exit while the store reads", "bulk store may still read", box<5, 2, 128, 0, 0, 0>},
    {"tensor: misaligned tensor", "multiple of 16", box<6, 2, 128, 0, 0, 0>},
};

}  // namespace
}  // namespace probe
