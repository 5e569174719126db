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

// The shapes of this thread's tiles, as long as it lives, are those of multiply_tiles. Whoever has had others before,
// as oneDNN, finds them again.
class TileShapes {
 public:
  TileShapes();
  ~TileShapes();
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// One of several products that are summed: how far behind `a` and `b` its operands lie.
struct TileTerm {
  int64_t a, b;
};
constexpr TileTerm kSingleTerm{0, 0};

// c [rows, columns] (+)= a [rows, depth] b [depth, columns], all sizes multiples of 16. Rows of a are dense; an element
// of `b` holds two neighbours along the depth, of which the first is the low half. Subnormal numbers count as zero.
void multiply_tiles(float* c, int64_t ldc, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t rows,
                    int64_t columns, int64_t depth, bool accumulate, const TileTerm* terms = &kSingleTerm,
                    int num_terms = 1);

}  // namespace arfast
