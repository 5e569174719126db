// The fastest matrix product on the CPU that we know for each type, as the function that core/matmul.h asks for.
#pragma once

#include "core/matmul.h"

namespace arfast {

void fastest_matmul(DType dtype, const Matrix& a, const Matrix& b, const Matrix& out);

}  // namespace arfast
