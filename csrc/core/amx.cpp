// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18. The compiler does not know what
// memory tiles are loaded from and stored to (GCC 12 does not say it in its header): nothing else here touches it.
#include "core/amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#define ARFAST_AMX_TARGET __attribute__((target("amx-tile,amx-bf16")))

namespace arfast {
namespace {

constexpr int64_t kTile = 16;     // rows of a tile, and 4-byte elements of a row
constexpr int64_t kDepth = 32;    // bfloat16 elements of a row
constexpr int64_t kMostSums = 4;  // tiles 0 to 3; 4 and 5 are operands, 6 and 7 operands of half the depth

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};
static_assert(sizeof(TileConfig) == 64);

// STEP(i) for each tile of sums: the intrinsics want the number of a tile as a literal.
#define ARFAST_EACH_SUM(STEP) \
  STEP(0)                     \
  if constexpr (kCount > 1) { \
    STEP(1)                   \
  }                           \
  if constexpr (kCount > 2) { \
    STEP(2)                   \
  }                           \
  if constexpr (kCount > 3) { \
    STEP(3)                   \
  }
#define ARFAST_CLEAR(i) _tile_zero(i);
#define ARFAST_LOAD(i) _tile_loadd(i, c + i * kTile * ldc, ldc * sizeof(float));
#define ARFAST_STORE(i) _tile_stored(i, c + i * kTile * ldc, ldc * sizeof(float));
#define ARFAST_ADD(i)                                              \
  _tile_loadd(4, a + i * kTile * lda + k, lda * sizeof(BFloat16)); \
  _tile_dpbf16ps(i, 4, 5);
#define ARFAST_ADD_HALF(i)                                         \
  _tile_loadd(6, a + i * kTile * lda + k, lda * sizeof(BFloat16)); \
  _tile_dpbf16ps(i, 6, 7);

// kCount tiles of c, one below the other.
template <int kCount>
ARFAST_AMX_TARGET void multiply_column(float* c, int64_t ldc, const BFloat16* first_a, int64_t lda,
                                       const uint32_t* first_b, int64_t ldb, int64_t depth, bool accumulate,
                                       const TileTerm* terms, int num_terms) {
  if (accumulate) {
    ARFAST_EACH_SUM(ARFAST_LOAD)
  } else {
    ARFAST_EACH_SUM(ARFAST_CLEAR)
  }
  for (const TileTerm* term = terms; term != terms + num_terms; ++term) {
    const BFloat16* a = first_a + term->a;
    const uint32_t* b = first_b + term->b;
    int64_t k = 0;
    for (; k + kDepth <= depth; k += kDepth) {
      _tile_loadd(5, b + k / 2 * ldb, ldb * sizeof(uint32_t));
      ARFAST_EACH_SUM(ARFAST_ADD)
    }
    if (k < depth) {
      _tile_loadd(7, b + k / 2 * ldb, ldb * sizeof(uint32_t));
      ARFAST_EACH_SUM(ARFAST_ADD_HALF)
    }
  }
  ARFAST_EACH_SUM(ARFAST_STORE)
}

ARFAST_AMX_TARGET void change_shapes(const void* shapes, void* before) {
  if (before != nullptr) _tile_storeconfig(before);
  _tile_loadconfig(shapes);
}

}  // namespace

bool machine_has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & (kBf16 | kTiles)) == (kBf16 | kTiles);
}

bool request_amx() {
  // Linux hands out the state of the tiles on request alone (Documentation/arch/x86/xstate.rst).
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

TileShapes::TileShapes() {
  static constexpr TileConfig kConfig;
  change_shapes(&kConfig, before_);
}

TileShapes::~TileShapes() { change_shapes(before_, nullptr); }

ARFAST_AMX_TARGET void multiply_tiles(float* c, int64_t ldc, const BFloat16* a, int64_t lda, const uint32_t* b,
                                      int64_t ldb, int64_t rows, int64_t columns, int64_t depth, bool accumulate,
                                      const TileTerm* terms, int num_terms) {
  constexpr decltype(&multiply_column<1>) kMultiply[] = {multiply_column<1>, multiply_column<2>, multiply_column<3>,
                                                         multiply_column<4>};
  for (int64_t row = 0; row < rows; row += kMostSums * kTile) {
    const auto multiply = kMultiply[std::min(kMostSums, (rows - row) / kTile) - 1];
    for (int64_t column = 0; column < columns; column += kTile) {
      multiply(c + row * ldc + column, ldc, a + row * lda, lda, b + column, ldb, depth, accumulate, terms, num_terms);
    }
  }
}

}  // namespace arfast

#else

namespace arfast {

bool machine_has_amx() { return false; }
bool request_amx() { return false; }
TileShapes::TileShapes() : before_{} {}
TileShapes::~TileShapes() = default;
void multiply_tiles(float*, int64_t, const BFloat16*, int64_t, const uint32_t*, int64_t, int64_t, int64_t, int64_t,
                    bool, const TileTerm*, int) {}

}  // namespace arfast

#endif
