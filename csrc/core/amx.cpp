// The instructions of AMX (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18), as
// assembly: compilers offer them only to code that is compiled for such machines altogether.
#include "core/amx.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/cpu_target.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace arfast {
namespace {

constexpr int64_t kTile = 16;                                        // rows of a tile, and 4-byte elements of a row
constexpr int64_t kDepth = 32;                                       // bfloat16 elements of a row
constexpr int kMostSums = 4;                                         // tiles 0 to 3
constexpr int kLeft = 4, kRight = 5, kHalfLeft = 6, kHalfRight = 7;  // halves: of a depth of 16

bool request_amx() {
  const char* wish = std::getenv("ARFAST_CPU_TARGET");
  const bool wished = wish == nullptr || std::strcmp(wish, "amx") == 0;
  if (!wished || cpu_target() != CpuTarget::kAvx512 || !__builtin_cpu_supports("avx512bf16")) return false;
  if (!machine_has_amx()) return false;
  // Linux hands out the state of the tiles on request alone (Documentation/arch/x86/xstate.rst).
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

TileConfig make_config() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = kTile;
  config.row_bytes[kHalfLeft] = 32;
  config.rows[kHalfRight] = kTile / 2;
  return config;
}

template <int kNumber>
inline void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(kNumber) : "memory");
}
template <int kNumber>
inline void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(kNumber) : "memory");
}
template <int kNumber>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kNumber));
}
template <int kSum, int kA, int kB>
inline void add_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

// f(integral_constant) for 0, ..., kCount - 1
template <int... kIndex, typename F>
inline void for_each(std::integer_sequence<int, kIndex...>, const F& f) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}

// kCount tiles of c, one below the other.
template <int kCount>
inline void multiply_column(float* c, int64_t ldc, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb,
                            int64_t depth, bool accumulate) {
  constexpr std::make_integer_sequence<int, kCount> kSums;
  for_each(kSums, [&](auto i) {
    if (accumulate) {
      load_tile<i>(c + i * kTile * ldc, ldc * sizeof(float));
    } else {
      clear_tile<i>();
    }
  });
  int64_t k = 0;
  for (; k + kDepth <= depth; k += kDepth) {
    load_tile<kRight>(b + k / 2 * ldb, ldb * sizeof(uint32_t));
    for_each(kSums, [&](auto i) {
      load_tile<kLeft>(a + i * kTile * lda + k, lda * sizeof(BFloat16));
      add_product<i, kLeft, kRight>();
    });
  }
  if (k < depth) {
    load_tile<kHalfRight>(b + k / 2 * ldb, ldb * sizeof(uint32_t));
    for_each(kSums, [&](auto i) {
      load_tile<kHalfLeft>(a + i * kTile * lda + k, lda * sizeof(BFloat16));
      add_product<i, kHalfLeft, kHalfRight>();
    });
  }
  for_each(kSums, [&](auto i) { store_tile<i>(c + i * kTile * ldc, ldc * sizeof(float)); });
}

}  // namespace

bool has_amx() {
  static const bool has = request_amx();
  return has;
}

bool machine_has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & (kBf16 | kTiles)) == (kBf16 | kTiles);
}

TileShapes::TileShapes() {
  static const TileConfig config = make_config();
  asm volatile("sttilecfg %0" : "=m"(before_));
  asm volatile("ldtilecfg %0" : : "m"(config));
}

TileShapes::~TileShapes() { asm volatile("ldtilecfg %0" : : "m"(before_)); }

void multiply_tiles(float* c, int64_t ldc, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t rows,
                    int64_t columns, int64_t depth, bool accumulate) {
  for (int64_t row = 0; row < rows; row += kMostSums * kTile, a += kMostSums * kTile * lda) {
    for (int64_t column = 0; column < columns; column += kTile) {
      float* target = c + row * ldc + column;
      switch (std::min<int64_t>(kMostSums, (rows - row) / kTile)) {
        case 4:
          multiply_column<4>(target, ldc, a, lda, b + column, ldb, depth, accumulate);
          break;
        case 3:
          multiply_column<3>(target, ldc, a, lda, b + column, ldb, depth, accumulate);
          break;
        case 2:
          multiply_column<2>(target, ldc, a, lda, b + column, ldb, depth, accumulate);
          break;
        default:
          multiply_column<1>(target, ldc, a, lda, b + column, ldb, depth, accumulate);
      }
    }
  }
}

}  // namespace arfast

#else

namespace arfast {

bool has_amx() { return false; }
bool machine_has_amx() { return false; }
TileShapes::TileShapes() : before_{} {}
TileShapes::~TileShapes() = default;
void multiply_tiles(float*, int64_t, const BFloat16*, int64_t, const uint32_t*, int64_t, int64_t, int64_t, int64_t,
                    bool) {}

}  // namespace arfast

#endif
