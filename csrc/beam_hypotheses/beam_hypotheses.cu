// The sequences of a beam search on the GPU: a warp for each. A walk along back-pointers waits for every one of them,
// so a block brings those of many steps into shared memory at once, and what lies along the way is then read together.
#include "beam_hypotheses/beam_hypotheses.h"
#include "core/reduce.cuh"
#include "core/runtime.cuh"

namespace arfast {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kSteps = 512;  // at once, fewer if there are many beams

struct Smem {
  int parents[8192];  // [steps, K]
  uint8_t path[kWarps][kSteps];
};

__host__ __device__ int64_t blocks_per_group(const BeamHypothesesParams& params) {
  return (params.num_hypotheses + kWarps - 1) / kWarps;
}

__global__ void __launch_bounds__(kThreads) beam_hypotheses_kernel(BeamHypothesesParams params) {
  Smem& smem = shared_storage<Smem>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int num_beams = static_cast<int>(params.num_beams);
  const int most_steps = min(kSteps, static_cast<int>(sizeof(smem.parents) / sizeof(int)) / num_beams);
  const int64_t blocks = blocks_per_group(params), group = blockIdx.x / blocks;
  const int64_t rank = blockIdx.x % blocks * kWarps + warp, index = group * params.num_hypotheses + rank;
  const bool exists = rank < params.num_hypotheses;  // else the warp helps
  const HypothesisEnding ending(params, group, exists ? rank : 0);
  const auto row_of = [&](int64_t step) { return (step * params.num_groups + group) * num_beams; };
  int beam = static_cast<int>(ending.beam);
  if (exists && lane == 0) params.lengths[index] = static_cast<int32_t>(ending.last + 1);
  for (int64_t chunk = (params.max_length - 1) / most_steps; chunk >= 0; --chunk) {
    const int64_t first = chunk * most_steps;
    const int steps = static_cast<int>(min(params.max_length - first, int64_t{most_steps}));
    __syncthreads();  // the steps before are read
    for (int i = threadIdx.x; i < steps * num_beams; i += kThreads) {
      const int64_t parent = params.parents[row_of(first + i / num_beams) + i % num_beams];
      smem.parents[i] = static_cast<int>(HypothesisEnding::clamp_beam(params, parent));
    }
    __syncthreads();
    if (!exists) continue;
    if (lane == 0) {
      for (int i = static_cast<int>(min(ending.last - first, int64_t{steps})) - 1; i >= 0; --i) {
        smem.path[warp][i] = static_cast<uint8_t>(beam);
        beam = smem.parents[i * num_beams + beam];
      }
    }
    __syncwarp();
    for (int i = lane; i < steps; i += kWarpSize) {
      const int64_t step = first + i, out = index * params.max_length + step;
      int64_t token = params.pad_token;
      float log_prob = 0;
      if (step < ending.last) {
        const int64_t at = row_of(step) + smem.path[warp][i];
        token = params.tokens[at];
        log_prob = params.log_probs[at];
      } else if (step == ending.last) {
        token = ending.token;
        log_prob = params.ending_log_probs[ending.index];
      }
      params.hypotheses[out] = token;
      params.hypotheses_log_probs[out] = log_prob;
    }
  }
}

}  // namespace

const char* beam_hypotheses_cuda(const BeamHypothesesParams& params, void* stream) {
  const int64_t blocks = params.num_groups * blocks_per_group(params);
  if (blocks > 0x7fffffff) return "B * K is too large for one launch";
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(Smem)};
  return launch(beam_hypotheses_kernel, shape, stream, params);
}

}  // namespace arfast
