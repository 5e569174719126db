// Grouped matrix products on the CPU: blocks of rows whose bounds depend on the groups alone, each on one thread, so
// the result does not depend on how many there are.
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/simd.h"
#include "core/tasks.h"
#include "grouped_mm/grouped_mm.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

constexpr int64_t kBlockRows = 256;

struct Block {
  int64_t group, begin, end;
};

void split(int64_t group, int64_t begin, int64_t end, std::vector<Block>& blocks) {
  for (; begin < end; begin += kBlockRows) blocks.push_back({group, begin, std::min(begin + kBlockRows, end)});
}

int64_t item_size(DType dtype) {
  int64_t size = 0;
  dispatch_dtype(dtype, [&](auto tag) { size = sizeof(typename decltype(tag)::type); });
  return size;
}

// Rows [begin, end) of a matrix.
Matrix rows_of(const Matrix& m, int64_t begin, int64_t end, int64_t item) {
  Matrix part = m;
  part.data = static_cast<char*>(m.data) + begin * m.row_stride * item;
  part.rows = end - begin;
  return part;
}

}  // namespace

void grouped_mm(const GroupedMmParams& params) {
  const int64_t item = item_size(params.dtype);
  std::vector<Block> blocks;
  for (int64_t group = 0; group < params.num_groups; ++group) {
    split(group, params.offsets[group], params.offsets[group + 1], blocks);
  }
  run_tasks(blocks.size(), [&](int64_t task) {
    const Block& block = blocks[task];
    Matrix b = params.b;
    b.data = static_cast<char*>(b.data) + block.group * params.b_group_stride * item;
    params.matmul({params.dtype, rows_of(params.a, block.begin, block.end, item), b,
                   rows_of(params.out, block.begin, block.end, item)});
  });
}

void grouped_mm_transposed(const GroupedMmTransposedParams& params) {
  const int64_t item = item_size(params.dtype), group_rows = params.out.rows, columns = params.out.columns;
  std::vector<Block> blocks;
  for (int64_t group = 0; group < params.num_groups; ++group) split(group, 0, group_rows, blocks);
  run_tasks(blocks.size(), [&](int64_t task) {
    const Block& block = blocks[task];
    const int64_t begin = params.offsets[block.group], end = params.offsets[block.group + 1];
    const Matrix out =
        rows_of(params.out, block.group * group_rows + block.begin, block.group * group_rows + block.end, item);
    // A group without rows has a zero gradient.
    if (begin == end) {
      std::memset(out.data, 0, static_cast<size_t>(out.rows * columns * item));
      return;
    }
    const Matrix a = transposed(rows_of(params.a, begin, end, item));
    params.matmul({params.dtype, rows_of(a, block.begin, block.end, item), rows_of(params.b, begin, end, item), out});
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
