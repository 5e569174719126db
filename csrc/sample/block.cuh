// What the block that finishes a row of sample works with: its shared memory.
#pragma once

#include "core/kept_tokens.cuh"
#include "core/select.cuh"
#include "sample/sample.h"

namespace arfast {

constexpr int kSampleThreads = kKeptThreads;
constexpr int kSampleSurvivors = 512;  // of top_k, ties with the last included, that are drawn from without the row

struct SampleSmem : KeptSmem {
  SelectStorage<kSampleThreads> select;
  uint64_t ranks[kSampleSurvivors];
  uint64_t weights[kSampleSurvivors];
  int num_survivors;
  bool is_last;
};

}  // namespace arfast
