// Proofs by brute force that the tiles which blocks find cover every row of every document or group once.
#include <random>

#include "attention/attention_cuda.cuh"
#include "core/grouped_product.cuh"
#include "emulator/probes/probe.h"

namespace probe {
namespace {

constexpr int kTile = 64;

// Offsets of random segments, empty ones among them, in a matrix that may go on after the last one.
std::vector<int32_t> random_offsets(std::mt19937& random, int count, int tile) {
  const int sizes[] = {0, 0, 1, tile - 1, tile, tile + 1, 2 * tile, 3 * tile + 5};
  std::vector<int32_t> offsets(1);
  for (int i = 0; i < count; ++i) offsets.push_back(offsets.back() + sizes[random() % 8]);
  return offsets;
}

template <typename T>
void fill(Memory<T>& memory, const std::vector<T>& values) {
  for (size_t i = 0; i < values.size(); ++i) memory[i] = values[i];
}

// One warp for each tile that a launch may have.
template <bool kOverKeys, bool kLastFirst>
__global__ void find_tile_kernel(AttentionProblem problem, SequenceTile* tiles) {
  const SequenceTile tile = find_tile<kTile, kOverKeys>(problem, blockIdx.x, kLastFirst);
  if (threadIdx.x == 0) tiles[blockIdx.x] = tile;
}

template <bool kOverKeys, bool kLastFirst>
std::vector<SequenceTile> find_tiles(const AttentionProblem& problem, const char** error) {
  const int64_t count = num_tiles<kTile>(problem, kOverKeys ? problem.num_keys : problem.num_queries);
  Memory<int> memory(count * sizeof(SequenceTile) / sizeof(int), "tiles");
  SequenceTile* tiles = reinterpret_cast<SequenceTile*>(memory.get());
  const LaunchShape shape{dim3(static_cast<unsigned>(count)), dim3(32)};
  *error =
      count == 0 ? nullptr : finish(launch(find_tile_kernel<kOverKeys, kLastFirst>, shape, nullptr, problem, tiles));
  std::vector<SequenceTile> found;
  for (int64_t i = 0; i < count && *error == nullptr; ++i) {
    if (tiles[i].num_rows > 0) found.push_back(tiles[i]);
  }
  return found;
}

template <bool kOverKeys, bool kLastFirst>
const char* batched() {
  for (const int rows : {0, 1, kTile - 1, kTile, kTile + 1, 3 * kTile + 7}) {
    AttentionProblem problem{};
    problem.batch = 3;
    problem.num_queries = kOverKeys ? 20 : rows;
    problem.num_keys = kOverKeys ? rows : 20;
    const char* error = nullptr;
    std::vector<int> owners(3 * rows);
    int before = kLastFirst ? rows : 0;
    for (const SequenceTile& tile : find_tiles<kOverKeys, kLastFirst>(problem, &error)) {
      if (tile.first < 0 || tile.first + tile.num_rows > rows) return "a tile is outside the matrix";
      if (tile.num_rows > kTile) return "a tile has too many rows";
      if (tile.seqlen_q != problem.num_queries || tile.seqlen_k != problem.num_keys)
        return "a sequence has another size";
      if (tile.q_row != 0 || tile.k_row != 0 || tile.padding || tile.sequence != tile.batch)
        return "a sequence begins in the middle";
      for (int i = 0; i < tile.num_rows; ++i) ++owners[tile.batch * rows + tile.first + i];
      // The later a query the more keys it sees, the earlier a key the more queries see it.
      if (kLastFirst ? tile.first > before : tile.first < before) return "a tile comes out of order";
      before = tile.first;
    }
    if (error != nullptr) return error;
    for (const int count : owners) {
      if (count != 1) return "a row is not in one tile";
    }
  }
  return nullptr;
}

// Documents in a matrix of `padding` more rows.
struct Packed {
  std::vector<int32_t> q, k;
  int q_padding, k_padding;
};

template <bool kOverKeys, bool kLastFirst>
const char* check_packed(const Packed& documents) {
  Memory<int32_t> q(documents.q.size(), "cu_seqlens_q"), k(documents.k.size(), "cu_seqlens_k");
  fill(q, documents.q);
  fill(k, documents.k);
  const int count = static_cast<int>(documents.q.size()) - 1;
  AttentionProblem problem{};
  problem.batch = count;
  problem.num_queries = documents.q.back() + documents.q_padding;
  problem.num_keys = documents.k.back() + documents.k_padding;
  problem.cu_seqlens_q = q.get();
  problem.cu_seqlens_k = k.get();
  const std::vector<int32_t>& own = kOverKeys ? documents.k : documents.q;
  const char* error = nullptr;
  std::vector<int> owners(kOverKeys ? problem.num_keys : problem.num_queries);
  int before = 0, document_before = -1;
  for (const SequenceTile& tile : find_tiles<kOverKeys, kLastFirst>(problem, &error)) {
    const int begin = (kOverKeys ? tile.k_row : tile.q_row) + tile.first;
    if (begin < 0 || begin + tile.num_rows > static_cast<int>(owners.size())) return "a tile is outside the matrix";
    if (tile.num_rows > kTile) return "a tile has too many rows";
    for (int i = 0; i < tile.num_rows; ++i) ++owners[begin + i];
    const int document = static_cast<int>(std::upper_bound(own.begin(), own.end(), begin) - own.begin()) - 1;
    if (tile.sequence != document) return "a tile has another document's number";
    if (tile.padding != (document == count)) return "padding is taken for a document";
    if (tile.padding) {
      if ((kOverKeys ? tile.seqlen_q : tile.seqlen_k) != 0) return "padding sees something";
    } else {
      const auto is = [&](const std::vector<int32_t>& ends, int row, int seqlen) {
        return ends[document] == row && ends[document + 1] == row + seqlen;
      };
      if (!is(documents.q, tile.q_row, tile.seqlen_q)) return "a tile has another document's queries";
      if (!is(documents.k, tile.k_row, tile.seqlen_k)) return "a tile has another document's keys";
    }
    if (document == document_before && (kLastFirst ? tile.first > before : tile.first < before)) {
      return "a tile comes out of order";
    }
    before = tile.first;
    document_before = document;
  }
  if (error != nullptr) return error;
  for (const int number : owners) {
    if (number != 1) return "a row is not in one tile";
  }
  return nullptr;
}

template <bool kOverKeys, bool kLastFirst>
const char* packed() {
  std::mt19937 random(7);
  for (const int count : {0, 1, 2, 31, 130, 270}) {
    const int paddings[] = {0, 1, kTile, 2 * kTile + 3};
    const Packed documents{random_offsets(random, count, kTile), random_offsets(random, count, kTile),
                           paddings[random() % 4], paddings[random() % 4]};
    if (const char* error = check_packed<kOverKeys, kLastFirst>(documents)) return error;
  }
  return nullptr;
}

// Offsets that nobody has checked: whatever they are, no tile reaches a row outside q and k.
template <bool kOverKeys, bool kLastFirst>
const char* unchecked() {
  std::mt19937 random(9);
  constexpr int kDocuments = 40, kQueries = 300, kKeys = 500;
  for (int round = 0; round < 4; ++round) {
    Memory<int32_t> q(kDocuments + 1, "cu_seqlens_q"), k(kDocuments + 1, "cu_seqlens_k");
    const auto any = [&] { return static_cast<int32_t>(round % 2 == 0 ? random() : random() % 900 - 200); };
    for (int i = 0; i <= kDocuments; ++i) {
      q[i] = any();
      k[i] = any();
    }
    AttentionProblem problem{};
    problem.batch = kDocuments;
    problem.num_queries = kQueries;
    problem.num_keys = kKeys;
    problem.cu_seqlens_q = q.get();
    problem.cu_seqlens_k = k.get();
    const char* error = nullptr;
    for (const SequenceTile& tile : find_tiles<kOverKeys, kLastFirst>(problem, &error)) {
      const auto inside = [](int row, int seqlen, int rows) { return row >= 0 && seqlen >= 0 && row + seqlen <= rows; };
      if (!inside(tile.q_row, tile.seqlen_q, kQueries)) return "queries outside q";
      if (!inside(tile.k_row, tile.seqlen_k, kKeys)) return "keys outside k";
      if (tile.first < 0 || tile.first + tile.num_rows > (kOverKeys ? tile.seqlen_k : tile.seqlen_q)) {
        return "rows outside the document";
      }
    }
    if (error != nullptr) return error;
  }
  return nullptr;
}

// The tiles that the blocks of a launch multiply, in any order.
__global__ void group_tiles_kernel(const int32_t* offsets, int groups, int rows, int columns, GroupTile* tiles,
                                   int* count) {
  for_each_group_tile(offsets, groups, rows, columns, [&](const GroupTile& tile) {
    if (threadIdx.x == 0) tiles[atomicAdd(count, 1)] = tile;
  });
}

const char* groups() {
  std::mt19937 random(5);
  for (const int count : {1, 2, 8, 140}) {
    const std::vector<int32_t> ends = random_offsets(random, count, kProductTile);
    const int columns = kProductTile + 9, rows = ends.back(), spare = static_cast<int>(random() % 2) * 50;
    Memory<int32_t> offsets(ends.size(), "offsets");
    fill(offsets, ends);
    const int bound = (rows / kProductTile + count) * 2;
    Memory<GroupTile> tiles(bound, "tiles");
    Memory<int> found(1, "count");
    const LaunchShape shape{dim3(1 + random() % 5), dim3(32)};
    const char* error = finish(launch(group_tiles_kernel, shape, nullptr, static_cast<const int32_t*>(offsets.get()),
                                      count, rows + spare, columns, tiles.get(), found.get()));
    if (error != nullptr) return error;
    std::vector<int> owners(size_t{2} * rows);
    for (int i = 0; i < found[0]; ++i) {
      const GroupTile& tile = tiles[i];
      if (tile.rows <= 0 || tile.rows > kProductTile || tile.column % kProductTile != 0)
        return "a tile has another size";
      if (tile.group < 0 || tile.group >= count) return "a tile has no group";
      if (tile.row < ends[tile.group] || tile.row + tile.rows > ends[tile.group + 1]) return "a tile leaves its group";
      for (int row = tile.row; row < tile.row + tile.rows; ++row) ++owners[2 * row + tile.column / kProductTile];
    }
    for (const int number : owners) {
      if (number != 1) return "a row is not in one tile";
    }
  }
  return nullptr;
}

const Register all{
    {"map: tiles of queries, batched", nullptr, batched<false, true>},
    {"map: tiles of keys, batched", nullptr, batched<true, false>},
    {"map: tiles of keys, batched, the last first", nullptr, batched<true, true>},
    {"map: tiles of queries, packed", nullptr, packed<false, true>},
    {"map: tiles of keys, packed", nullptr, packed<true, false>},
    {"map: tiles of keys, packed, the last first", nullptr, packed<true, true>},
    {"map: tiles of queries, unchecked offsets", nullptr, unchecked<false, true>},
    {"map: tiles of keys, unchecked offsets", nullptr, unchecked<true, false>},
    {"map: tiles of groups", nullptr, groups},
};

}  // namespace
}  // namespace probe
