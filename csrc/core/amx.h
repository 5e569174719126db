// Matrix units of the CPU (Intel AMX): products of bfloat16 tiles, summed in float.
#pragma once

#include <cstdint>

#include "core/dtype.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace arfast {

// Whether this machine has them, its system lets this process use them, and ARFAST_CPU_TARGET (unset, or amx) allows
// it.
bool has_amx();

// Whether this machine has them, for others that may use them.
bool machine_has_amx();

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

// c [rows, columns] (+)= a [rows, depth] b [depth, columns], all sizes multiples of 16. Rows of a are dense; an element
// of `b` holds two neighbours along the depth, of which the first is the low half. Subnormal numbers count as zero.
void multiply_tiles(float* c, int64_t ldc, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t rows,
                    int64_t columns, int64_t depth, bool accumulate);

#if defined(__AVX512F__)
// 32 floats as bfloat16, of machines for which has_amx() holds. Subnormal numbers become zero.
inline __m512i round_to_bf16(__m512 first, __m512 second) {
  __m512i rounded;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(rounded) : "v"(second), "v"(first));
  return rounded;
}
#endif

}  // namespace arfast
