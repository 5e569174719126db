// The integer functions that decide where elements lie and how work is cut, for tests that try all of their arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention/attention_cuda.cuh"
#include "attention/attention_decode_cuda.cuh"
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

arfast::KeyRange key_range(bool causal, int64_t window, int seqlen_q, int seqlen_k) {
  arfast::AttentionProblem problem{};
  problem.causal = causal;
  problem.window = window;
  arfast::SequenceTile tile{};
  tile.seqlen_q = seqlen_q;
  tile.seqlen_k = seqlen_k;
  return {problem, tile};
}

std::pair<int, int> pair_of(const arfast::TileRange& range) { return {range.first, range.end}; }

// [begin, end) of every range
std::vector<std::pair<int64_t, int64_t>> decode_ranges(int64_t seqlen, int64_t num_queries, int64_t window,
                                                       int64_t num_splits) {
  const arfast::DecodeSplits splits(seqlen, num_queries, window, num_splits);
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t i = 0; i < splits.count; ++i) ranges.push_back({splits.begin(i), splits.end(i)});
  return ranges;
}

// Of every block of a launch: (sequence, key-value head, its only range?, for each row (row, the keys that it sees)).
template <int kRows>
auto decode_blocks(const std::vector<int32_t>& seqlens, int64_t num_queries, int64_t group, int64_t num_kv_heads,
                   int64_t window, int64_t num_splits) {
  arfast::AttentionDecodeParams params{};
  params.batch = static_cast<int64_t>(seqlens.size());
  params.num_queries = num_queries;
  params.num_kv_heads = num_kv_heads;
  params.num_heads = group * num_kv_heads;
  params.window = window;
  params.seqlens = seqlens.data();
  params.capacity = 1000;
  params.num_splits = num_splits;
  params.max_splits = arfast::most_decode_splits(params.capacity, num_queries, window, num_splits);
  using Row = std::pair<int, std::vector<int>>;
  std::vector<std::tuple<int, int, bool, std::vector<Row>>> blocks;
  for (int64_t i = 0; i < arfast::num_decode_blocks<kRows>(params); ++i) {
    const auto block = arfast::DecodeBlock::find<kRows>(params, i);
    if (!block.exists) continue;
    std::vector<Row> rows;
    for (int row = 0; row < kRows; ++row) {
      rows.push_back({block.first_row + row, {}});
      for (int key = block.begin; key < block.end + 100; ++key) {
        if (block.sees(block.position(params, row), key)) rows.back().second.push_back(key);
      }
    }
    blocks.push_back({block.sequence, block.kv_head, block.alone, rows});
  }
  return blocks;
}

}  // namespace

PYBIND11_MODULE(_integers, module) {
  namespace py = pybind11;
  using arfast::KeyRange;
  py::class_<KeyRange>(module, "KeyRange")
      .def(py::init(&key_range))
      .def("begin", &KeyRange::begin)
      .def("end", &KeyRange::end)
      .def("hides", &KeyRange::hides)
      .def("key_tiles",
           [](const KeyRange& range, int tile, int a, int b) { return pair_of(range.key_tiles(tile, a, b)); })
      .def("later_key_tiles", &KeyRange::later_key_tiles)
      .def("query_tiles",
           [](const KeyRange& range, int tile, int a, int b) { return pair_of(range.query_tiles(tile, a, b)); });
  module.def("decode_ranges", decode_ranges);
  module.def("most_decode_splits", arfast::most_decode_splits);
  module.def("decode_blocks_of_3_rows", decode_blocks<3>);
  module.def("decode_blocks_of_16_rows", decode_blocks<16>);
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
