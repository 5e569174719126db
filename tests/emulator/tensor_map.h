// The emulator's tensor map. It has the driver's name, since kernels take it as a parameter.
#pragma once

#include <cstdint>

struct alignas(64) CUtensorMap {
  uint32_t magic = 0, rank = 0, element_bytes = 0, swizzle_bytes = 0;
  uint64_t base = 0;
  uint64_t sizes[5] = {};    // in elements, the innermost one first
  uint64_t strides[5] = {};  // in bytes
  uint32_t box[5] = {};
};
