// Matrix units of the CPU (Intel AMX): products of bfloat16 tiles, summed in float.
#pragma once

#include <cstdint>

#include "core/cpu_target.h"
#include "core/dtype.h"

namespace arfast {

// Whether this machine has them, whoever uses them.
bool machine_has_amx();

// Asks the system to let this process use them, which it must before it can.
bool request_amx();

inline bool has_amx() { return cpu_target() == CpuTarget::kAmx; }

// The shapes of this thread's tiles, as long as it lives, are those of multiply_tiles and multiply_split_tiles. Whoever
// has had others before, as oneDNN, finds them again.
class TileShapes {
 public:
  enum Kind { kHalfDepths, kSplit };  // of multiply_tiles, of multiply_split_tiles
  explicit TileShapes(Kind kind = kHalfDepths);
  ~TileShapes();
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// c [rows, columns] (+)= a [rows, depth] b [depth, columns], all sizes multiples of 16. Rows of a are dense; an element
// of `b` holds two neighbours along the depth, of which the first is the low half. Subnormal numbers count as zero.
void multiply_tiles(float* c, int64_t ldc, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t rows,
                    int64_t columns, int64_t depth, bool accumulate);

// Operands that are sums of three parts, each a slice of a depth and two tiles wide, in pairs of neighbours along the
// depth: a [part][row][pair], b [part][tile][pair][column of the tile].
constexpr int64_t kSplitParts = 3, kSplitWidth = 32, kSplitPairs = 32;
constexpr int64_t kSplitPart = kSplitWidth * kSplitPairs;

// c (+)= a b, of the nine products of parts the six that matter, for 1 or 2 tiles of rows and of columns and a depth of
// 32 or 64. Tiles [16, 16] of c are dense: those of the second row of tiles begin c_row behind those of the first.
void multiply_split_tiles(float* c, int64_t c_row, const uint32_t* a, const uint32_t* b, int64_t row_tiles,
                          int64_t column_tiles, int64_t depth, bool accumulate);

}  // namespace arfast
