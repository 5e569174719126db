// The integer functions that decide where elements lie and how work is cut, for tests that try all of their arguments.
#include <pybind11/pybind11.h>

#include "beam_prune/beam_prune.h"
#include "core/tile.cuh"
#include "cross_entropy/ring.h"

namespace {

// (number of parts of a row, vectors of a part)
std::pair<int64_t, int64_t> beam_prune_parts(int64_t rows, int64_t vocab_size, int64_t element_size) {
  arfast::BeamPruneParams params{};
  params.num_groups = rows;
  params.num_beams = 1;
  params.vocab_size = vocab_size;
  arfast::choose_beam_prune_parts(element_size, params);
  return {params.num_parts, params.part_vectors};
}

// (threads, blocks of a cluster, vectors of a part, stages); 0 blocks: not for the ring
std::tuple<int, int, int, int> cross_entropy_ring_shape(int64_t vectors, int largest_cluster) {
  const arfast::RingShape shape = arfast::ring_shape(vectors, largest_cluster);
  return {shape.threads, shape.blocks, shape.part_vectors, shape.stages};
}

int64_t cross_entropy_row_vectors(uintptr_t logits, int64_t stride, int64_t vocab_size, int64_t element_size) {
  arfast::CrossEntropyParams params{};
  params.logits = reinterpret_cast<const void*>(logits);
  params.logits_stride = stride;
  params.vocab_size = vocab_size;
  return arfast::longest_row_vectors(params, 16 / element_size);
}

}  // namespace

PYBIND11_MODULE(_integers, module) {
  module.def("swizzle_128", [](uint32_t offset) { return arfast::swizzle_128(offset); });
  module.def("fragment_row", [](int thread, int i) { return arfast::fragment_row(thread, i); });
  module.def("fragment_column", [](int thread, int i) { return arfast::fragment_column(thread, i); });
  module.def("swizzled_descriptor", [](uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
    return arfast::swizzled_descriptor(address, leading_bytes, stride_bytes);
  });
  module.def("beam_prune_parts", beam_prune_parts);
  module.def("cross_entropy_ring_shape", cross_entropy_ring_shape);
  module.def("cross_entropy_row_vectors", cross_entropy_row_vectors);
}
