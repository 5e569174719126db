// Probes of matrix instructions: ldmatrix, stmatrix, mma.sync and wgmma. Products of small integers are exact.
#include "core/dtype.h"
#include "core/tile.cuh"
#include "emulator/probes/probe.h"

namespace probe {
namespace {

// 16-bit patterns of the integers in [-8, 8], by hand, so that the tests do not rest on the conversions under test.
template <typename T>
uint16_t bits_of(int x) {
  const int magnitude = x < 0 ? -x : x;
  if (magnitude == 0) return 0;
  int exponent = 0;
  while (magnitude >> (exponent + 1) != 0) ++exponent;
  const int mantissa_bits = std::is_same_v<T, BFloat16> ? 7 : 10, bias = std::is_same_v<T, BFloat16> ? 127 : 15;
  const int fraction = (magnitude << mantissa_bits >> exponent) & ((1 << mantissa_bits) - 1);
  return static_cast<uint16_t>((x < 0 ? 0x8000 : 0) | (exponent + bias) << mantissa_bits | fraction);
}
int element(int matrix, int row, int column) { return (matrix * 7 + row * 5 + column * 3 + row * column) % 9 - 4; }

struct alignas(16) Tiles {
  uint16_t tile[4][8][8];
};

// Four matrices from shared memory to registers and back, transposed or not.
template <int kBug, bool kTransposed>
__global__ void move_kernel(const uint16_t* in, uint32_t* registers, uint16_t* out) {
  Tiles& smem = shared_storage<Tiles>();
  const int lane = threadIdx.x;
  uint16_t* const all = &smem.tile[0][0][0];
  for (int i = lane; i < 256; i += 32) all[i] = in[i];
  if (kBug != 1) __syncwarp();
  uint32_t r[4];
  const uint32_t row = ptx::shared_address(all) + lane * 16 + (kBug == 2 ? 2 : 0) + (kBug == 3 ? 16 : 0);
  if (kBug != 4 || lane < 16) {
    if (kTransposed) {
      ptx::ldmatrix_x4_trans(r, row);
    } else {
      ptx::ldmatrix_x4(r, row);
    }
    for (int i = 0; i < 4; ++i) registers[i * 32 + lane] = r[i];
  }
  __syncwarp();
  if (kTransposed) {
    ptx::stmatrix_x4_trans(row, r);
  } else {
    ptx::stmatrix_x4(row, r);
  }
  if (kBug != 5) __syncwarp();
  for (int i = lane; i < 256; i += 32) out[i] = all[i];
}

template <int kBug, bool kTransposed>
const char* move() {
  Memory<uint16_t> in(256, "in"), out(256, "out");
  Memory<uint32_t> registers(128, "registers");
  for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i);
  const LaunchShape shape{dim3(1), dim3(32), sizeof(Tiles)};
  const char* error =
      finish(launch(move_kernel<kBug, kTransposed>, shape, nullptr, in.get(), registers.get(), out.get()));
  if (error == nullptr) error = expect(out, [](int i) { return static_cast<uint16_t>(i); });
  return error ? error : expect(registers, [](int i) {
    // The manual's picture: thread 4 r + c / 2 holds the elements c and c + 1 of row r (of column r when transposed).
    const int matrix = i / 32, r = i % 32 / 4, c = i % 4 * 2;
    const int first = kTransposed ? c * 8 + r : r * 8 + c, second = first + (kTransposed ? 8 : 1);
    return static_cast<uint32_t>(matrix * 64 + first) | static_cast<uint32_t>(matrix * 64 + second) << 16;
  });
}

// One product of 16 x 16 and 16 x 8, with fragments that are filled from the manual's index formulas.
template <int kBug, typename T>
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
  uint32_t ra[4], rb[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i == 1 || i == 3 ? 8 : 0), k = q * 2 + (i >= 2 ? 8 : 0);
    ra[kBug == 1 ? i ^ 3 : i] = a[row * 16 + k] | static_cast<uint32_t>(a[row * 16 + k + 1]) << 16;
  }
  for (int i = 0; i < 2; ++i) {
    const int k = q * 2 + 8 * i;
    rb[i] = b[k * 8 + g] | static_cast<uint32_t>(b[(k + 1) * 8 + g]) << 16;
  }
  float c[4] = {1, 2, 3, 4};
  if (kBug != 2 || lane != 5) ptx::mma_m16n8k16<T>(c, ra, rb[0], rb[1]);
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i >= 2 ? 8 : 0), column = 2 * q + (i & 1);
    d[row * 8 + column] = c[i];
  }
}

template <int kBug, typename T>
const char* mma() {
  Memory<uint16_t> a(256, "a"), b(128, "b");
  Memory<float> d(128, "d");
  for (int i = 0; i < 256; ++i) a[i] = bits_of<T>(element(0, i / 16, i % 16));
  for (int i = 0; i < 128; ++i) b[i] = bits_of<T>(element(1, i / 8, i % 8));
  const char* error = finish(launch(mma_kernel<kBug, T>, {dim3(1), dim3(32)}, nullptr, a.get(), b.get(), d.get()));
  return error ? error : expect(d, [](int i) {
    const int row = i / 8, column = i % 8;
    float sum = static_cast<float>(1 + (row >= 8 ? 2 : 0) + column % 2);
    for (int k = 0; k < 16; ++k) sum += static_cast<float>(element(0, row, k) * element(1, k, column));
    return sum;
  });
}

constexpr int kDepth = 64;

template <int kColumns>
struct alignas(1024) Operands {
  uint16_t a[64 * kDepth];
  uint16_t b[kColumns * kDepth];
};

// 64 x N x 64 by one warpgroup; rows of 128 bytes with the 128-byte swizzle, written by threads.
template <int kBug, typename T, int kColumns, bool kTransposed, bool kRegisters>
__global__ void __launch_bounds__(128) wgmma_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  Operands<kColumns>& smem = shared_storage<Operands<kColumns>>();
  const int t = threadIdx.x;
  // Chunk c of row r lies at chunk c ^ (r % 8).
  const auto place = [](int row, int column) {
    return row * 64 + ((column / 8 ^ (kBug == 1 ? 0 : row % 8)) * 8) + column % 8;
  };
  for (int i = t; i < 64 * kDepth; i += 128) smem.a[place(i / kDepth, i % kDepth)] = a[i];
  for (int i = t; i < kColumns * kDepth; i += 128) {
    const int n = i / kDepth, k = i % kDepth;  // b is [N, K]
    smem.b[kTransposed ? n / 64 * 64 * kDepth + place(k, n % 64) : place(n, k)] = b[i];
  }
  if (kBug != 2) ptx::fence_proxy_async();
  if (kBug != 3) __syncthreads();
  float c[kColumns / 2];
  for (int i = 0; i < kColumns / 2; ++i) c[i] = 0;
  uint32_t fragments[kDepth / 16][4];
  for (int s = 0; s < kDepth / 16; ++s) {
    for (int i = 0; i < 4; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k = 16 * s + t % 4 * 2 + i / 2 * 8;
      fragments[s][i] = a[row * kDepth + k] | static_cast<uint32_t>(a[row * kDepth + k + 1]) << 16;
    }
  }
  if (kBug != 4) ptx::wgmma_fence();
  const uint32_t begin_a = ptx::shared_address(smem.a), begin_b = ptx::shared_address(smem.b);
  const uint32_t stride = kBug == 5 ? 512 : 1024, leading = kTransposed ? (kBug == 6 ? 4096 : 8192) : 0;
  if (kBug != 7 || t < 96) {
    for (int s = 0; s < kDepth / 16; ++s) {
      const uint32_t step_a = kBug == 8 ? 64 : 32, step_b = kTransposed ? 16 * 128 : 32;
      const uint64_t db = swizzled_descriptor(begin_b + s * step_b, leading, stride);
      if (kRegisters) {
        ptx::wgmma_rs<T, kTransposed>(c, fragments[s], db, s > 0);
      } else {
        ptx::wgmma_ss<T, kTransposed>(c, swizzled_descriptor(begin_a + s * step_a, 0, 1024), db,
                                      kBug == 9 ? s + t % 2 : s > 0);
      }
    }
    ptx::wgmma_commit();
  }
  if (kBug == 10) smem.b[t] = 0;
  if (kBug != 11) ptx::wgmma_wait<kBug == 12 ? 1 : 0>();
  for (int i = 0; i < kColumns / 2; ++i) d[fragment_row(t, i) * kColumns + fragment_column(t, i)] = c[i];
}

template <int kBug, typename T, int kColumns, bool kTransposed, bool kRegisters = false>
const char* wgmma() {
  Memory<uint16_t> a(64 * kDepth, "a"), b(kColumns * kDepth, "b");
  Memory<float> d(64 * kColumns, "d");
  for (size_t i = 0; i < a.size(); ++i) a[i] = bits_of<T>(element(0, i / kDepth, i % kDepth));
  for (size_t i = 0; i < b.size(); ++i) b[i] = bits_of<T>(element(1, i / kDepth, i % kDepth));
  const LaunchShape shape{dim3(1), dim3(128), sizeof(Operands<kColumns>)};
  const char* error = finish(
      launch(wgmma_kernel<kBug, T, kColumns, kTransposed, kRegisters>, shape, nullptr, a.get(), b.get(), d.get()));
  return error ? error : expect(d, [](int i) {
    float sum = 0;
    for (int k = 0; k < kDepth; ++k) {
      sum += static_cast<float>(element(0, i / kColumns, k) * element(1, i % kColumns, k));
    }
    return sum;
  });
}

const Register all{
    {"matrices", nullptr, move<0, false>},
    {"matrices: transposed", nullptr, move<0, true>},
    {"matrices: no __syncwarp before ldmatrix", "race: write, then read without order", move<1, false>},
    {"matrices: misaligned row", "misaligned: ldmatrix", move<2, false>},
    {"matrices: row out of bounds", "out of bounds: ldmatrix", move<3, false>},
    {"matrices: half a warp", "lanes of one mask execute", move<4, false>},
    {"matrices: no __syncwarp after stmatrix", "race: write, then read without order", move<5, true>},
    {"mma bf16", nullptr, mma<0, BFloat16>},
    {"mma f16", nullptr, mma<0, Float16>},
    {"mma: wrong fragment", "wrong result", mma<1, BFloat16>},
    {"mma: one lane is missing", "needs all lanes of the warp", mma<2, BFloat16>},
    {"wgmma bf16 64", nullptr, wgmma<0, BFloat16, 64, false>},
    {"wgmma bf16 64, transposed", nullptr, wgmma<0, BFloat16, 64, true>},
    {"wgmma f16 128", nullptr, wgmma<0, Float16, 128, false>},
    {"wgmma bf16 128, transposed", nullptr, wgmma<0, BFloat16, 128, true>},
    {"wgmma bf16 256", nullptr, wgmma<0, BFloat16, 256, false>},
    {"wgmma f16 256, transposed", nullptr, wgmma<0, Float16, 256, true>},
    {"wgmma bf16 64, registers", nullptr, wgmma<0, BFloat16, 64, false, true>},
    {"wgmma f16 128, registers, transposed", nullptr, wgmma<0, Float16, 128, true, true>},
    {"wgmma: no swizzle", "wrong result", wgmma<1, BFloat16, 64, false>},
    {"wgmma: no proxy fence", "missing fence.proxy.async", wgmma<2, BFloat16, 64, false>},
    {"wgmma: no barrier", "uninitialised shared memory", wgmma<3, BFloat16, 64, false>},
    {"wgmma: no wgmma_fence", "without a wgmma_fence", wgmma<4, BFloat16, 64, false>},
    {"wgmma: wrong stride", "wrong result", wgmma<5, BFloat16, 64, false>},
    {"wgmma: wrong leading offset", "wrong result", wgmma<6, BFloat16, 128, true>},
    {"wgmma: a warp does not take part", "of 128 threads have issued it", wgmma<7, BFloat16, 64, false>},
    {"wgmma: wrong step in k", "wrong result", wgmma<8, BFloat16, 64, false>},
    {"wgmma: threads disagree", "mismatch: ", wgmma<9, BFloat16, 64, false>},
    {"wgmma: operand overwritten before the wait", "race: read, then write", wgmma<10, BFloat16, 64, false>},
    {"wgmma: no wait", "exits while its wgmma", wgmma<11, BFloat16, 64, false>},
    {"wgmma: wait for too few groups", "while its wgmma are under way", wgmma<12, BFloat16, 64, false>},
};

}  // namespace
}  // namespace probe
