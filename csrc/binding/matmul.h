// The fastest matrix product on the CPU that we know for each type and machine.
#pragma once

#include "core/matmul.h"

namespace arfast {

// On the calling thread within a parallel region.
#if defined(ARFAST_EMULATED)
constexpr Matmul fastest_matmul = nullptr;  // for the CPU implementations, which are not there
#else
void fastest_matmul(const MatmulParams& params);
#endif

}  // namespace arfast
