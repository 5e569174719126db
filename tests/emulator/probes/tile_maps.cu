// Proofs by brute force of MatrixTile: its chunks, what ldmatrix reads and where accumulators go, against maps that are
// written down here once more, and that no eight lanes or no warp meet a bank of shared memory twice.
#include <set>

#include "core/matrix_tile.cuh"
#include "core/tile.cuh"
#include "emulator/probes/probe.h"

namespace probe {
namespace {

using T = BFloat16;
constexpr int kRows = 32, kThreads = 128;

// Memory seen as one struct of integers.
template <typename Struct>
Struct& as_struct(Memory<int>& memory) {
  return *reinterpret_cast<Struct*>(memory.get());
}

// Byte offsets in a tile.
template <int kColumns>
struct Addresses {
  static constexpr int kSteps = kColumns / 16;
  int chunks[kRows][kColumns / 8];
  int fragments[4][2][kSteps][32];  // of a, b and their transposed kinds: [kind][16 rows][16 columns][lane]
  int pairs[2][kColumns / 8][32];   // of store_accumulators from row 16 on
};

template <int kColumns>
__global__ void addresses_kernel(Addresses<kColumns>* out) {
  using Tile = MatrixTile<T, kRows, kColumns>;
  Tile& tile = shared_storage<Tile>();
  const int lane = threadIdx.x;
  const uint32_t base = ptx::shared_address(tile.elements);
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = lane; chunk < kColumns / 8; chunk += 32) {
      out->chunks[row][chunk] = Tile::place(row, chunk) * static_cast<int>(sizeof(T));
    }
  }
  const uint32_t first[4] = {tile.a_address(0), tile.b_address(0), tile.transposed_a_address(0),
                             tile.transposed_b_address(0)};
  for (int i = 0; i < 4 * 2 * (kColumns / 16); ++i) {
    const int kind = i / 2 / (kColumns / 16), rows = i / (kColumns / 16) % 2, k = i % (kColumns / 16);
    out->fragments[kind][rows][k][lane] = static_cast<int>(Tile::fragment(first[kind], 16 * rows, k) - base);
  }
  for (int i = 0; i < 2 * (kColumns / 8); ++i) {
    const int half = i % 2, n = i / 2;
    const T* pair = tile.pair(16 + 8 * half + lane / 4, 8 * n + 2 * (lane % 4));
    out->pairs[half][n][lane] = static_cast<int>(ptx::shared_address(pair) - base);
  }
}

// Whether the accesses of `lanes` lanes, of `bytes` bytes each, meet every bank at most once.
bool free_of_conflicts(const int* offsets, int lanes, int bytes) {
  std::set<int> banks;
  for (int i = 0; i < lanes; ++i) {
    for (int byte = 0; byte < bytes; byte += 4) banks.insert((offsets[i] + byte) / 4 % 32);
  }
  return static_cast<int>(banks.size()) == lanes * bytes / 4;
}

// The map: rows of whole groups of 8 chunks, within which the row's number is exclusive-ored with the chunk's.
template <int kColumns>
int offset_of(int row, int chunk) {
  const int group = chunk / 8, row_groups = (kColumns + 63) / 64;
  return ((row * row_groups + group) * 8 + (chunk % 8 ^ row % 8)) * 16;
}

// The row and chunk that a lane reads for ldmatrix, by the order of the four matrices of each kind of operand.
std::pair<int, int> fragment_place(int kind, int lane) {
  const int matrix = lane / 8, low = matrix % 2, high = matrix / 2;
  const bool rows_first = kind == 0 || kind == 3;  // a, and b transposed: the second matrix lies 8 rows below
  return {(rows_first ? low : high) * 8 + lane % 8, rows_first ? high : low};
}

template <int kColumns>
const char* addresses() {
  using Tile = MatrixTile<T, kRows, kColumns>;
  Memory<int> out(sizeof(Addresses<kColumns>) / sizeof(int), "out");
  Addresses<kColumns>& found = as_struct<Addresses<kColumns>>(out);
  const LaunchShape shape{dim3(1), dim3(32), sizeof(Tile)};
  if (const char* error = finish(launch(addresses_kernel<kColumns>, shape, nullptr, &found))) return error;
  std::set<int> chunks;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < kColumns / 8; ++chunk) {
      const int offset = found.chunks[row][chunk];
      if (offset != offset_of<kColumns>(row, chunk)) return "a chunk is elsewhere";
      if (offset < 0 || offset + 16 > static_cast<int>(sizeof(Tile))) return "a chunk is outside the tile";
      if (!chunks.insert(offset).second) return "two chunks are in one place";
    }
  }
  for (int i = 0; i < 4 * 2 * (kColumns / 16); ++i) {
    const int kind = i / 2 / (kColumns / 16), rows = i / (kColumns / 16) % 2, k = i % (kColumns / 16);
    const int* offsets = found.fragments[kind][rows][k];
    for (int lane = 0; lane < 32; ++lane) {
      const auto [row, chunk] = fragment_place(kind, lane);
      if (offsets[lane] != offset_of<kColumns>(16 * rows + row, 2 * k + chunk)) return "a fragment is elsewhere";
    }
    for (int phase = 0; phase < 32; phase += 8) {
      if (!free_of_conflicts(offsets + phase, 8, 16)) return "a phase of ldmatrix meets a bank twice";
    }
  }
  for (int i = 0; i < 2 * (kColumns / 8); ++i) {
    if (!free_of_conflicts(found.pairs[i % 2][i / 2], 32, 4)) return "a store of accumulators meets a bank twice";
  }
  return nullptr;
}

// What load and gather copy, and what store_accumulators stores: rows, then columns.
template <int kColumns>
struct Contents {
  int loaded[2][kRows][kColumns];
  int stored[2][kRows][kColumns];
};

template <int kColumns>
__global__ void contents_kernel(const T* source, int stride, int rows, int columns, Contents<kColumns>* out) {
  using Tile = MatrixTile<T, kRows, kColumns>;
  Tile& tile = shared_storage<Tile>();
  const auto read = [&](const auto& f) {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
      const int row = i / kColumns, column = i % kColumns;
      f(row, column, tile.elements[Tile::place(row, column / 8) + column % 8]);
    }
    __syncthreads();
  };
  tile.template load<kThreads>({source, stride}, rows, columns);
  read([&](int row, int column, T x) { out->loaded[0][row][column] = x.bits; });
  tile.template gather<kThreads>([&](int row) { return source + row * stride; }, rows, columns);
  read([&](int row, int column, T x) { out->loaded[1][row][column] = x.bits; });
  for (int kind = 0; kind < 2; ++kind) {
    for (int first = 0; first < kRows && threadIdx.x < 32; first += 16) {
      float sums[kColumns / 8][4];
      for (int i = 0; i < kColumns / 2; ++i) {
        const int row = first + fragment_row(threadIdx.x, i % 4), column = fragment_column(threadIdx.x, i);
        sums[i / 4][i % 4] = static_cast<float>(kind == 0 ? row : column);
      }
      tile.store_accumulators(first, 0, sums, {1.0f, 2.0f});
    }
    read([&](int row, int column, T x) { out->stored[kind][row][column] = static_cast<int>(to_float(x)); });
  }
}

template <int kColumns>
const char* contents() {
  using Tile = MatrixTile<T, kRows, kColumns>;
  constexpr int kStride = kColumns + 8, kGivenRows = kRows - 3;
  for (const int columns : {kColumns, kColumns - 5, 3}) {
    Memory<T> source(kRows * kStride, "source");
    for (size_t i = 0; i < source.size(); ++i) source[i].bits = static_cast<uint16_t>(i + 1);
    Memory<int> out(sizeof(Contents<kColumns>) / sizeof(int), "out");
    Contents<kColumns>& found = as_struct<Contents<kColumns>>(out);
    const LaunchShape shape{dim3(1), dim3(kThreads), sizeof(Tile)};
    const char* error = finish(launch(contents_kernel<kColumns>, shape, nullptr, static_cast<const T*>(source.get()),
                                      kStride, kGivenRows, columns, &found));
    if (error != nullptr) return error;
    for (int i = 0; i < kRows * kColumns; ++i) {
      const int row = i / kColumns, column = i % kColumns, factor = row % 16 < 8 ? 1 : 2;
      const bool given = row < kGivenRows && column < columns;
      const int expected = given ? row * kStride + column + 1 : 0;
      if (found.loaded[0][row][column] != expected) return "load has another element";
      if (found.loaded[1][row][column] != expected) return "gather has another element";
      if (found.stored[0][row][column] != factor * row) return "an accumulator is in another row";
      if (found.stored[1][row][column] != factor * column) return "an accumulator is in another column";
    }
  }
  // The phases of the copies: 8 threads with neighbouring chunks.
  constexpr int kRowChunks = Tile::kRowChunks;
  for (int first = 0; first < kThreads; first += 8) {
    int offsets[8], lanes = 0;
    for (int thread = first; thread < first + 8; ++thread) {
      const int chunk = thread % kRowChunks, row = thread / kRowChunks;
      if (chunk < Tile::kChunks) offsets[lanes++] = offset_of<kColumns>(row, chunk);
    }
    if (!free_of_conflicts(offsets, lanes, 16)) return "a phase of cp.async meets a bank twice";
  }
  return nullptr;
}

const Register all{
    {"map: addresses in a tile of 32 columns", nullptr, addresses<32>},
    {"map: addresses in a tile of 64 columns", nullptr, addresses<64>},
    {"map: addresses in a tile of 96 columns", nullptr, addresses<96>},
    {"map: addresses in a tile of 128 columns", nullptr, addresses<128>},
    {"map: addresses in a tile of 256 columns", nullptr, addresses<256>},
    {"map: contents of a tile of 32 columns", nullptr, contents<32>},
    {"map: contents of a tile of 64 columns", nullptr, contents<64>},
    {"map: contents of a tile of 96 columns", nullptr, contents<96>},
    {"map: contents of a tile of 128 columns", nullptr, contents<128>},
    {"map: contents of a tile of 256 columns", nullptr, contents<256>},
};

}  // namespace
}  // namespace probe
