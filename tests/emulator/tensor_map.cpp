// Tensor maps and the copies of boxes that they describe: cp.async.bulk.tensor in tiled mode, without interleaving.
#include "emulator/tensor_map.h"

#include <algorithm>
#include <cstring>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr uint32_t kMagic = 0x7e250a11;

uint32_t box_bytes(const CUtensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (uint32_t dim = 0; dim < map.rank; ++dim) bytes *= map.box[dim];
  return bytes;
}

// Where 16 bytes at shared address `address` really are: the hardware exchanges the 16-byte chunks of 8 (4, 2) rows by
// the bits of the address itself.
uint32_t swizzled(uint32_t address, uint32_t swizzle_bytes) {
  const uint32_t chunks = swizzle_bytes / 16;
  return chunks == 0 ? address : address ^ ((address >> 7 & (chunks - 1)) << 4);
}

// Calls f(shared address, global address or 0 when outside of the tensor, bytes) for each element of the box.
template <typename F>
void for_each_element(const AsyncOperation& operation, const F& f) {
  const CUtensorMap& map = *operation.map;
  const uint32_t row_bytes = map.box[0] * map.element_bytes, rows = operation.bytes / row_bytes;
  for (uint32_t row = 0; row < rows; ++row) {
    uint64_t begin = map.base;
    bool inside = true;
    for (uint32_t dim = 1, rest = row; dim < map.rank; ++dim) {
      const int64_t at = int64_t{operation.coordinates[dim]} + rest % map.box[dim];
      rest /= map.box[dim];
      inside = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[dim]);
      begin += static_cast<uint64_t>(at) * map.strides[dim];
    }
    for (uint32_t byte = 0; byte < row_bytes; byte += map.element_bytes) {
      const int64_t at = int64_t{operation.coordinates[0]} + byte / map.element_bytes;
      const uint32_t offset = operation.shared + row * row_bytes + byte;
      const bool exists = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[0]);
      f(swizzled(offset & ~15u, map.swizzle_bytes) + offset % 16,
        exists ? begin + static_cast<uint64_t>(at) * map.element_bytes : 0, map.element_bytes);
    }
  }
}

AsyncOperation prepare(AsyncOperation::Kind kind, uint32_t shared, const CUtensorMap* map, int rank,
                       const int* coordinates, const char* what, uintptr_t pc) {
  Thread& self = *current;
  require_sm90(what, pc);
  if (map->magic != kMagic) fail(std::string(what) + ": not a tensor map", pc);
  if (map->rank != static_cast<uint32_t>(rank)) {
    fail(format("%s: %d coordinates for a tensor map of rank %u", what, rank, map->rank), pc);
  }
  // The layout repeats every 8, 4 or 2 rows of 128 bytes. Elsewhere the swizzle is that of the address, which kernels
  // that compute it from the row get wrong.
  const uint32_t alignment = map->swizzle_bytes == 0 ? 128 : 8 * map->swizzle_bytes;
  require_shared(*self.block, shared, box_bytes(*map), alignment, what, pc);
  AsyncOperation operation{.thread = &self,
                           .block = self.block,
                           .kind = kind,
                           .shared = shared,
                           .bytes = box_bytes(*map),
                           .global = 0,
                           .mbarrier = nullptr,
                           .value = {},
                           .map = std::make_shared<CUtensorMap>(*map),
                           .coordinates = {}};
  std::copy_n(coordinates, rank, operation.coordinates);
  return operation;
}

}  // namespace

const char* make_tensor_map(CUtensorMap* map, const void* base, int element_bytes, int rank, const uint64_t* sizes,
                            const uint64_t* strides, const uint32_t* box, int swizzle_bytes) {
  if (rank < 1 || rank > 5) return "tensor map: the rank must be in [1, 5]";
  if (element_bytes != 1 && element_bytes != 2 && element_bytes != 4 && element_bytes != 8) {
    return "tensor map: an element must have 1, 2, 4 or 8 bytes";
  }
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return "tensor map: the address must be a multiple of 16";
  if (swizzle_bytes != 0 && swizzle_bytes != 32 && swizzle_bytes != 64 && swizzle_bytes != 128) {
    return "tensor map: the swizzle must be 0, 32, 64 or 128 bytes";
  }
  *map = CUtensorMap();
  for (int dim = 0; dim < rank; ++dim) {
    if (sizes[dim] == 0 || sizes[dim] > uint64_t{1} << 32) return "tensor map: a size must be in [1, 2^32]";
    if (box[dim] == 0 || box[dim] > 256) return "tensor map: a side of the box must be in [1, 256]";
    if (dim > 0 && (strides[dim - 1] % 16 != 0 || strides[dim - 1] >= uint64_t{1} << 40)) {
      return "tensor map: a stride must be a multiple of 16 bytes below 2^40";
    }
    map->sizes[dim] = sizes[dim];
    map->box[dim] = box[dim];
    map->strides[dim] = dim == 0 ? element_bytes : strides[dim - 1];
  }
  const uint32_t inner = box[0] * element_bytes;
  if (inner % 16 != 0) return "tensor map: the box's inner side must be a multiple of 16 bytes";
  if (swizzle_bytes != 0 && inner > static_cast<uint32_t>(swizzle_bytes)) {
    return "tensor map: the box's inner side must not exceed the swizzle";
  }
  map->magic = kMagic;
  map->rank = rank;
  map->element_bytes = element_bytes;
  map->swizzle_bytes = swizzle_bytes;
  map->base = reinterpret_cast<uint64_t>(base);
  return nullptr;
}

void tensor_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int rank, const int* coordinates) {
  const uintptr_t pc = EMULATOR_CALLER;
  AsyncOperation operation =
      prepare(AsyncOperation::kTensorLoad, destination, map, rank, coordinates, "tensor_load", pc);
  Block& block = *operation.block;
  Mbarrier& mbarrier = require_mbarrier(block, barrier, "tensor_load", pc);
  operation.mbarrier = &mbarrier;
  const Actor actor{current, mbarrier.agent, mbarrier.phase + 1, true};
  check_shared(block, barrier, 8, {current, current->agent, current->epoch, true}, AccessKind::kAtomicRead, pc);
  for_each_element(operation, [&](uint32_t shared, uint64_t global, uint32_t bytes) {
    check_shared(block, shared, bytes, actor, AccessKind::kWrite, pc);
    if (global == 0) return;
    require_global(global, bytes, 1, "tensor_load", pc);
    check_global(global, bytes, actor, AccessKind::kRead, pc);
  });
  memset(block.arena + destination, 0xff, operation.bytes);
  enqueue(std::move(operation));
}

void tensor_store(const CUtensorMap* map, uint32_t source, int rank, const int* coordinates) {
  const uintptr_t pc = EMULATOR_CALLER;
  AsyncOperation operation = prepare(AsyncOperation::kTensorStore, source, map, rank, coordinates, "tensor_store", pc);
  Thread& self = *current;
  const Epoch epoch = self.block->stores[self.number / 32] + 1;
  for_each_element(operation, [&](uint32_t shared, uint64_t global, uint32_t bytes) {
    if (global == 0) return;
    check_shared(*self.block, shared, bytes, {&self, store_agent(self), epoch, true}, AccessKind::kRead, pc);
    require_global(global, bytes, 1, "tensor_store", pc);
    check_global(global, bytes, {&self, store_agent(self) + kMaxWarps, epoch, true}, AccessKind::kWrite, pc);
  });
  self.store_open = true;
  enqueue(std::move(operation));
}

void copy_box(const AsyncOperation& operation) {
  const bool loads = operation.kind == AsyncOperation::kTensorLoad;
  for_each_element(operation, [&](uint32_t shared, uint64_t global, uint32_t bytes) {
    char* place = operation.block->arena + shared;
    if (!loads) {
      if (global != 0) memcpy(reinterpret_cast<void*>(global), place, bytes);
    } else if (global != 0) {
      memcpy(place, reinterpret_cast<const void*>(global), bytes);
    } else {
      memset(place, 0, bytes);
    }
  });
}

}  // namespace emulator
