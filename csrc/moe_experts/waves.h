// How the rows of the experts pass through in waves, and the tasks of one wave. All bounds depend on the routing and on
// the room of the scratch memory alone; a result does not even depend on the latter.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/simd.h"
#include "moe_experts/moe_experts.h"

namespace arfast::ARFAST_CPU_TARGET {

// Rows of one task: of the tokens' matrices (about), of the output.
constexpr int64_t kTaskRows = 256;
// Rows of a weight gradient: more of them share one packed matrix of the tokens.
constexpr int64_t kWeightTaskRows = 512;

// One expert's rows of a wave: rows [first, first + count) of the order by expert, at [begin, begin + padded) of the
// scratch memory.
struct Segment {
  int64_t expert, first, count, begin;
  int64_t padded() const { return moe_padded_rows(count); }
};

// Rows [begin, end) of a segment, its padding included.
struct RowTask {
  Segment segment;
  int64_t begin, end;
  int64_t scratch_row() const { return segment.begin + begin; }
  int64_t rows() const { return end - begin; }
  // How many of the rows are not padding.
  int64_t filled() const { return std::clamp<int64_t>(segment.count - begin, 0, rows()); }
};

template <typename F>
void for_each_wave(const MoeExpertsShape& shape, const F& f) {
  std::vector<Segment> segments;
  int64_t used = 0;
  for (int64_t expert = 0; expert < shape.num_experts; ++expert) {
    Segment segment{expert, shape.offsets[expert], shape.offsets[expert + 1] - shape.offsets[expert], 0};
    if (segment.count == 0) continue;
    if (used + segment.padded() > shape.wave_rows) {
      f(segments);
      segments.clear();
      used = 0;
    }
    segment.begin = used;
    used += segment.padded();
    segments.push_back(segment);
  }
  if (!segments.empty()) f(segments);
}

inline std::vector<RowTask> row_tasks(const std::vector<Segment>& segments) {
  std::vector<RowTask> tasks;
  for (const Segment& segment : segments) {
    const int64_t count = std::max<int64_t>(1, (segment.padded() + kTaskRows / 2) / kTaskRows);
    const int64_t size = moe_padded_rows((segment.padded() + count - 1) / count);
    for (int64_t begin = 0; begin < segment.padded(); begin += size) {
      tasks.push_back({segment, begin, std::min(begin + size, segment.padded())});
    }
  }
  return tasks;
}

}  // namespace arfast::ARFAST_CPU_TARGET
