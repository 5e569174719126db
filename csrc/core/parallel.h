// Threads of the CPU implementations. They are torch's own (the binding installs its parallel_for), so that
// torch.set_num_threads holds and no second pool competes for the cores; without a binding everything runs serially.
#pragma once

#include <cstdint>

namespace arfast {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction f, void* context);

void set_parallel_for(ParallelFor parallel_for);
ParallelFor get_parallel_for();

// Calls f(begin, end) on disjoint ranges that cover [0, count), each at least `grain` long but for the last. Which
// range an index falls into depends on the number of threads: a result must not, so reductions go through
// parallel_blocks.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain) return f(int64_t{0}, count);
  RangeFunction call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  get_parallel_for()(0, count, grain, call, const_cast<F*>(&f));
}

// Calls f(block, begin, end) for consecutive blocks of `block_size` indices. The blocks depend on the sizes alone, so
// partial results kept per block and added in order of the blocks are bit-identical for every number of threads.
template <typename F>
void parallel_blocks(int64_t count, int64_t block_size, const F& f) {
  const int64_t num_blocks = (count + block_size - 1) / block_size;
  parallel_for(num_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * block_size;
      const int64_t end = begin + block_size < count ? begin + block_size : count;
      f(block, begin, end);
    }
  });
}

// Indices per task so that a task does about 32k elements of work: smaller ones cost more to hand out than to do.
static inline int64_t grain_for(int64_t elements_per_index) {
  const int64_t grain = 32768 / (elements_per_index > 0 ? elements_per_index : 1);
  return grain > 0 ? grain : 1;
}

}  // namespace arfast
