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

// The shapes of this thread's tiles, as long as it lives, are those of multiply_tiles or multiply_strips. Whoever has
// had others before, as oneDNN, finds them again.
class TileShapes {
 public:
  enum Kind { kHalfDepths, kWhole };  // of multiply_tiles, of multiply_strips
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

// Operands in strips, two tiles wide, that are sums of parts: one of bfloat16, three of float32. A strip lies in slices
// of the depth, in pairs of neighbours along it: a [part][row][pair], b [part][tile][pair][column of the tile].
constexpr int64_t kStripWidth = 32;
constexpr int64_t slice_pairs(int parts) { return parts == 1 ? 128 : 32; }
constexpr int64_t slice_part(int parts) { return kStripWidth * slice_pairs(parts); }

// c (+)= a b, of the nine products of three parts the six that matter, for 1 or 2 tiles of rows and of columns and a
// depth that is a multiple of 32, within a slice. Tiles [16, 16] of c are dense: those of the second row of tiles begin
// c_row behind those of the first.
void multiply_strips(int parts, float* c, int64_t c_row, const uint32_t* a, const uint32_t* b, int64_t row_tiles,
                     int64_t column_tiles, int64_t depth, bool accumulate);

}  // namespace arfast
