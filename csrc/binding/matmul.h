// The fastest matrix product on the CPU that we know for each type and machine.
#pragma once

#include "core/matmul.h"

namespace arfast {

// On the calling thread within a parallel region.
void fastest_matmul(const MatmulParams& params);

}  // namespace arfast
