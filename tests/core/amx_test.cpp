// Tests the matrix units' products against sums in double, at every number of tiles, and that TileShapes leaves the
// shapes of others as it found them.
#include "core/amx.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

namespace arfast {
namespace {

int failures = 0;

void expect(bool condition, const char* what, int64_t rows = 0, int64_t columns = 0, int64_t depth = 0) {
  if (condition) return;
  if (++failures <= 20) std::printf("FAILED %s: %ld x %ld, depth %ld\n", what, rows, columns, depth);
}

constexpr int64_t kGap = 3;  // elements behind a row of each matrix, which belong to nobody
constexpr uint16_t kNan = 0x7fc0;

// Multiples of 1/8 that bfloat16 holds: their products and sums are exact in float.
class Matrices {
 public:
  Matrices(int64_t rows, int64_t columns, int64_t depth)
      : rows_(rows),
        columns_(columns),
        depth_(depth),
        a_(rows * lda(), BFloat16{kNan}),
        b_(depth / 2 * ldb(), uint32_t{kNan} << 16 | kNan),
        c_(rows * ldc(), std::numeric_limits<float>::quiet_NaN()),
        exact_(rows * columns, 0.0) {
    std::mt19937 random(static_cast<unsigned>(rows * 1000003 + columns * 1009 + depth));
    std::uniform_int_distribution<int> eighths(-40, 40);
    std::vector<float> a(rows * depth), b(depth * columns);
    for (float& value : a) value = static_cast<float>(eighths(random)) / 8;
    for (float& value : b) value = static_cast<float>(eighths(random)) / 8;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < depth; ++k) a_[i * lda() + k] = BFloat16{upper_half(a[i * depth + k])};
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t k = 0; k < depth; ++k) exact_[i * columns + j] += double{a[i * depth + k]} * b[k * columns + j];
      }
    }
    for (int64_t k = 0; k < depth; k += 2) {
      for (int64_t j = 0; j < columns; ++j) {
        const uint32_t low = upper_half(b[k * columns + j]), high = upper_half(b[(k + 1) * columns + j]);
        b_[k / 2 * ldb() + j] = high << 16 | low;
      }
    }
  }

  // The product, then the product once more on top of it.
  void check() {
    for (int times = 1; times <= 2; ++times) {
      multiply_tiles(c_.data(), ldc(), a_.data(), lda(), b_.data(), ldb(), rows_, columns_, depth_, times > 1);
      bool right = true, gap = true;
      for (int64_t i = 0; i < rows_; ++i) {
        for (int64_t j = 0; j < columns_; ++j) right &= c_[i * ldc() + j] == times * exact_[i * columns_ + j];
        for (int64_t j = columns_; j < ldc(); ++j) gap &= std::isnan(c_[i * ldc() + j]);
      }
      expect(right, times == 1 ? "product" : "accumulated product", rows_, columns_, depth_);
      expect(gap, "what lies behind the rows", rows_, columns_, depth_);
    }
  }

 private:
  static uint16_t upper_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<uint16_t>(bits >> 16);
  }
  int64_t lda() const { return depth_ + kGap; }
  int64_t ldb() const { return columns_ + kGap; }
  int64_t ldc() const { return columns_ + kGap; }

  const int64_t rows_, columns_, depth_;
  std::vector<BFloat16> a_;
  std::vector<uint32_t> b_;
  std::vector<float> c_;
  std::vector<double> exact_;
};

void test_products() {
  const TileShapes shapes;
  for (int64_t rows = 16; rows <= 144; rows += 16) {
    for (const int64_t columns : {16, 32, 80}) {
      for (const int64_t depth : {16, 32, 48, 64, 112}) Matrices(rows, columns, depth).check();
    }
  }
}

// Parts that are multiples of 1/8 as well, each its own number: a product of two that should not count shows.
template <int kParts>
void test_strips(int64_t rows, int64_t columns, int64_t depth) {
  constexpr int64_t kTile = 16, kTileSums = kTile * kTile, kRowOfTiles = 3 * kTileSums;  // a tile that is nobody's
  constexpr int64_t kPairs = slice_pairs(kParts);
  constexpr int kCounts[3][3] = {{1, 1, 1}, {1, 1, 0}, {1, 0, 0}};
  std::mt19937 random(7);
  std::uniform_int_distribution<int> eighths(-40, 40);
  const auto bits = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits >> 16;
  };
  static float a[kParts][kStripWidth][2 * kPairs], b[kParts][2 * kPairs][kStripWidth];
  std::vector<uint32_t> packed_a(kParts * slice_part(kParts)), packed_b(kParts * slice_part(kParts));
  for (int64_t part = 0; part < kParts; ++part) {
    for (int64_t i = 0; i < kStripWidth; ++i) {
      for (int64_t k = 0; k < 2 * kPairs; ++k) {
        a[part][i][k] = static_cast<float>(eighths(random)) / 8;
        b[part][k][i] = static_cast<float>(eighths(random)) / 8;
      }
      for (int64_t pair = 0; pair < kPairs; ++pair) {
        const int64_t tile = part * slice_part(kParts) + (i / kTile * kPairs + pair / kTile * kTile) * kTile;
        packed_a[tile + i % kTile * kTile + pair % kTile] = bits(a[part][i][2 * pair]) | bits(a[part][i][2 * pair + 1])
                                                                                             << 16;
        packed_b[tile + pair % kTile * kTile + i % kTile] = bits(b[part][2 * pair][i]) | bits(b[part][2 * pair + 1][i])
                                                                                             << 16;
      }
    }
  }
  std::vector<float> c(2 * kRowOfTiles, std::numeric_limits<float>::quiet_NaN());
  for (int times = 1; times <= 2; ++times) {
    multiply_strips(kParts, c.data(), kRowOfTiles, packed_a.data(), packed_b.data(), rows, columns, depth, times > 1);
    bool right = true;
    int64_t written = 0;
    for (int64_t i = 0; i < rows * kTile; ++i) {
      for (int64_t j = 0; j < columns * kTile; ++j) {
        double exact = 0;
        for (int p = 0; p < kParts; ++p) {
          for (int q = 0; q < kParts; ++q) {
            for (int64_t k = 0; k < kCounts[p][q] * depth; ++k) exact += double{a[p][i][k]} * b[q][k][j];
          }
        }
        right &= times * exact == c[i / kTile * kRowOfTiles + j / kTile * kTileSums + i % kTile * kTile + j % kTile];
      }
    }
    for (const float value : c) written += !std::isnan(value);
    expect(right, times == 1 ? "product of strips" : "accumulated product of strips", rows, columns, depth);
    expect(written == rows * columns * kTileSums, "tiles of a product of strips", rows, columns, depth);
  }
}

void test_strips() {
  const TileShapes shapes(TileShapes::kWhole);
  for (const int64_t rows : {1, 2}) {
    for (const int64_t columns : {1, 2}) {
      for (const int64_t depth : {32, 64}) test_strips<3>(rows, columns, depth);
      for (const int64_t depth : {32, 64, 256}) test_strips<1>(rows, columns, depth);
    }
  }
}

struct alignas(64) Shapes {
  uint8_t bytes[64] = {};
};

__attribute__((target("amx-tile"))) void load_shapes(const Shapes& shapes) { _tile_loadconfig(&shapes); }
__attribute__((target("amx-tile"))) Shapes store_shapes() {
  Shapes shapes;
  _tile_storeconfig(&shapes);
  return shapes;
}
bool same(const Shapes& a, const Shapes& b) { return std::memcmp(&a, &b, sizeof(Shapes)) == 0; }

void test_shapes_of_others() {
  Shapes others;  // tile 0 alone, of 5 rows of 24 bytes
  others.bytes[0] = 1;
  others.bytes[16] = 24;
  others.bytes[48] = 5;
  for (const Shapes& before : {others, Shapes()}) {
    load_shapes(before);
    expect(same(store_shapes(), before), "shapes as loaded");
    {
      const TileShapes shapes;
      expect(!same(store_shapes(), before), "shapes of multiply_tiles");
      const Shapes ours = store_shapes();
      {
        const TileShapes again(TileShapes::kWhole);
        expect(!same(store_shapes(), ours), "shapes of multiply_strips");
      }
      expect(same(store_shapes(), ours), "shapes of multiply_tiles after a second object");
      Matrices(48, 32, 48).check();
    }
    expect(same(store_shapes(), before), "shapes restored");
  }
}

}  // namespace
}  // namespace arfast

int main() {
  using namespace arfast;
  if (!machine_has_amx() || !request_amx()) {
    std::printf("this machine has no matrix units\n");
    return 77;
  }
  test_products();
  test_strips();
  test_shapes_of_others();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

#else

int main() { return 77; }

#endif
