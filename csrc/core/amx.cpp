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
constexpr int64_t kMostSums = 4;  // tiles 0 to 3; 4 to 7 are operands, in multiply_tiles 6 and 7 of half the depth

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kWholeTiles;
constexpr TileConfig kHalfDepthTiles{.row_bytes = {64, 64, 64, 64, 64, 64, 32, 64},
                                     .rows = {16, 16, 16, 16, 16, 16, 16, 8}};

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
ARFAST_AMX_TARGET void multiply_column(float* c, int64_t ldc, const BFloat16* a, int64_t lda, const uint32_t* b,
                                       int64_t ldb, int64_t depth, bool accumulate) {
  if (accumulate) {
    ARFAST_EACH_SUM(ARFAST_LOAD)
  } else {
    ARFAST_EACH_SUM(ARFAST_CLEAR)
  }
  int64_t k = 0;
  for (; k + kDepth <= depth; k += kDepth) {
    _tile_loadd(5, b + k / 2 * ldb, ldb * sizeof(uint32_t));
    ARFAST_EACH_SUM(ARFAST_ADD)
  }
  if (k < depth) {
    _tile_loadd(7, b + k / 2 * ldb, ldb * sizeof(uint32_t));
    ARFAST_EACH_SUM(ARFAST_ADD_HALF)
  }
  ARFAST_EACH_SUM(ARFAST_STORE)
}

// STEP(tile, row, column) for each tile of sums of multiply_strip.
#define ARFAST_EACH_STRIP_SUM(STEP)          \
  STEP(0, 0, 0)                              \
  if constexpr (kColumns > 1) {              \
    STEP(1, 0, 1)                            \
  }                                          \
  if constexpr (kRows > 1) {                 \
    STEP(2, 1, 0)                            \
  }                                          \
  if constexpr (kRows > 1 && kColumns > 1) { \
    STEP(3, 1, 1)                            \
  }
#define ARFAST_STRIP_CLEAR(tile, i, j) _tile_zero(tile);
#define ARFAST_STRIP_LOAD(tile, i, j) _tile_loadd(tile, c + i * c_row + j * kTile * kTile, kTile * sizeof(float));
#define ARFAST_STRIP_STORE(tile, i, j) _tile_stored(tile, c + i * c_row + j * kTile * kTile, kTile * sizeof(float));

// Loads tiles of an operand, one beside the other, and multiplies by each when it has come, not when both have.
#define ARFAST_LOAD_TILE(tile, strip, i) \
  _tile_loadd(tile, strip + i * kTile * slice_pairs(kParts), kTile * sizeof(uint32_t));

template <int kParts, int kRows, int kColumns>
ARFAST_AMX_TARGET inline void multiply_new_left(const uint32_t* a) {
  ARFAST_LOAD_TILE(4, a, 0)
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kColumns > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kRows > 1) {
    ARFAST_LOAD_TILE(5, a, 1)
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kColumns > 1) _tile_dpbf16ps(3, 5, 7);
  }
}

template <int kParts, int kRows, int kColumns>
ARFAST_AMX_TARGET inline void multiply_new_right(const uint32_t* b) {
  ARFAST_LOAD_TILE(6, b, 0)
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kRows > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kColumns > 1) {
    ARFAST_LOAD_TILE(7, b, 1)
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kRows > 1) _tile_dpbf16ps(3, 5, 7);
  }
}

// Of three parts the largest product comes last, and each but the first shares a part with the one before it: 14 tiles
// are loaded for 24 products. One takes 7.6 ns with operands in the first-level cache, 9 from the second; of one part,
// with a load for each, 8.2 and 10 (one thread of a Granite Rapids, November 2026, random numbers; zeros are faster).
template <int kParts, int kRows, int kColumns>
ARFAST_AMX_TARGET void multiply_strip(float* c, int64_t c_row, const uint32_t* a, const uint32_t* b, int64_t pairs,
                                      bool accumulate) {
  if (accumulate) {
    ARFAST_EACH_STRIP_SUM(ARFAST_STRIP_LOAD)
  } else {
    ARFAST_EACH_STRIP_SUM(ARFAST_STRIP_CLEAR)
  }
  for (int64_t k = 0; k < pairs * kTile; k += kTile * kTile) {
    const auto left = [&](int part) { multiply_new_left<kParts, kRows, kColumns>(a + part * slice_part(kParts) + k); };
    const auto right = [&](int part) {
      multiply_new_right<kParts, kRows, kColumns>(b + part * slice_part(kParts) + k);
    };
    ARFAST_LOAD_TILE(6, (b + k), 0)
    if constexpr (kColumns > 1) ARFAST_LOAD_TILE(7, (b + k), 1)
    if constexpr (kParts == 3) left(2), left(1), right(1), left(0), right(2), right(0);
    if constexpr (kParts == 1) left(0);
  }
  ARFAST_EACH_STRIP_SUM(ARFAST_STRIP_STORE)
}

template <int kParts>
constexpr decltype(&multiply_strip<kParts, 1, 1>) kMultiplyStrip[2][2] = {
    {multiply_strip<kParts, 1, 1>, multiply_strip<kParts, 1, 2>},
    {multiply_strip<kParts, 2, 1>, multiply_strip<kParts, 2, 2>}};

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

TileShapes::TileShapes(Kind kind) { change_shapes(kind == kWhole ? &kWholeTiles : &kHalfDepthTiles, before_); }

TileShapes::~TileShapes() { change_shapes(before_, nullptr); }

ARFAST_AMX_TARGET void multiply_tiles(float* c, int64_t ldc, const BFloat16* a, int64_t lda, const uint32_t* b,
                                      int64_t ldb, int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  constexpr decltype(&multiply_column<1>) kMultiply[] = {multiply_column<1>, multiply_column<2>, multiply_column<3>,
                                                         multiply_column<4>};
  for (int64_t row = 0; row < rows; row += kMostSums * kTile) {
    const auto multiply = kMultiply[std::min(kMostSums, (rows - row) / kTile) - 1];
    for (int64_t column = 0; column < columns; column += kTile) {
      multiply(c + row * ldc + column, ldc, a + row * lda, lda, b + column, ldb, depth, accumulate);
    }
  }
}

void multiply_strips(int parts, float* c, int64_t c_row, const uint32_t* a, const uint32_t* b, int64_t row_tiles,
                     int64_t column_tiles, int64_t depth, bool accumulate) {
  const auto& multiply = parts == 1 ? kMultiplyStrip<1> : kMultiplyStrip<3>;
  multiply[row_tiles - 1][column_tiles - 1](c, c_row, a, b, depth / 2, accumulate);
}

}  // namespace arfast

#else

namespace arfast {

bool machine_has_amx() { return false; }
bool request_amx() { return false; }
TileShapes::TileShapes(Kind) : before_{} {}
TileShapes::~TileShapes() = default;
void multiply_tiles(float*, int64_t, const BFloat16*, int64_t, const uint32_t*, int64_t, int64_t, int64_t, int64_t,
                    bool) {}
void multiply_strips(int, float*, int64_t, const uint32_t*, const uint32_t*, int64_t, int64_t, int64_t, bool) {}

}  // namespace arfast

#endif
