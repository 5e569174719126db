// Products of bfloat16 matrices on the CPU by its own instructions, where it has them.
#pragma once

#include "core/matmul.h"

// Instructions that not every machine with AVX-512 has: see has_bf16_products.
#if defined(__x86_64__)
#define ARFAST_BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace arfast {

// Whether this machine adds products of bfloat16 pairs to a float32 (AVX512_BF16), and ARFAST_CPU_TARGET allows it.
bool has_bf16_products();

// Our own product of bfloat16: the sum is kept in float32 and rounded once. The bits of an element depend on its row of
// `a`, its column of `b` and K alone. Subnormal numbers count as zero, which is the instruction's rule.
void bf16_matmul(const MatmulParams& params);

}  // namespace arfast
