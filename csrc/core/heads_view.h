// Tensors of heads as the contracts pass them: where they are and how far apart, in elements.
#pragma once

#include <cstdint>

namespace arfast {

// A tensor [B, T, H, D], or [N, H, D] when documents are packed (then batch_stride is 0). D is dense.
struct HeadsView {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

}  // namespace arfast
