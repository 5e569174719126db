// The integer functions that decide where elements lie and how work is cut, for tests that try all of their arguments.
#include "beam_prune/beam_prune.h"
#include "core/tile.cuh"

#define INTEGER_FUNCTION extern "C" __attribute__((visibility("default")))

INTEGER_FUNCTION uint32_t integer_swizzle_128(uint32_t offset) { return arfast::swizzle_128(offset); }
INTEGER_FUNCTION int integer_fragment_row(int thread, int i) { return arfast::fragment_row(thread, i); }
INTEGER_FUNCTION int integer_fragment_column(int thread, int i) { return arfast::fragment_column(thread, i); }
INTEGER_FUNCTION uint64_t integer_swizzled_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return arfast::swizzled_descriptor(address, leading, stride);
}
INTEGER_FUNCTION void integer_beam_prune_parts(int64_t rows, int64_t vocab_size, int64_t element_size, int64_t* parts,
                                               int64_t* part_vectors) {
  arfast::BeamPruneParams params{};
  params.num_groups = rows;
  params.num_beams = 1;
  params.vocab_size = vocab_size;
  arfast::choose_beam_prune_parts(element_size, params);
  *parts = params.num_parts;
  *part_vectors = params.part_vectors;
}
