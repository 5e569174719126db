// Checks of the routing tables that the mixture-of-experts ops take: wrong ones would read or write out of bounds.
#pragma once

#include "binding/tensor.h"

namespace arfast {

// int32 [E + 1], from 0 to num_rows without decreasing, dense, on the CPU.
void check_offsets(const char* op, const Tensor& offsets, int64_t num_rows);

// int32 [T, K] that names every row in [0, T * K) once -> int32 [T * K]: the choice t * K + j behind each row.
Tensor invert_position(const char* op, const Tensor& position);

}  // namespace arfast
