// SwiGLU experts on the CPU (Shazeer 2020, arXiv 2002.05202, equation 6, in a mixture of experts). The rows pass
// through in waves of a few experts, small enough for the cache: nothing of [T * K, ...] but the saved pre-activations
// is ever in memory. Tasks are blocks of rows or of weight rows whose bounds depend on the routing alone, each on one
// thread, so the result does not depend on how many there are.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "core/simd.h"
#include "moe_experts/moe_experts.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

// Rows of one task, and rows of a weight gradient that one task computes.
constexpr int64_t kTaskRows = 256;

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

std::vector<RowTask> row_tasks(const std::vector<Segment>& segments) {
  std::vector<RowTask> tasks;
  for (const Segment& segment : segments) {
    const int64_t count = (segment.padded() + kTaskRows - 1) / kTaskRows;
    const int64_t size = moe_padded_rows((segment.padded() + count - 1) / count);
    for (int64_t begin = 0; begin < segment.padded(); begin += size) {
      tasks.push_back({segment, begin, std::min(begin + size, segment.padded())});
    }
  }
  return tasks;
}

// Calls f(task) for every task; threads take the next one when they are done, since tasks differ in size.
template <typename Task, typename F>
void run_tasks(const std::vector<Task>& tasks, const F& f) {
  std::atomic<size_t> next{0};
  parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) f(tasks[i]);
  });
}

template <typename T>
T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}
template <typename T>
const T* at(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

// The weights [rows, columns] of one expert.
template <typename T>
Matrix expert_matrix(void* weights, int64_t expert, int64_t rows, int64_t columns) {
  return dense_matrix(at<T>(weights, expert * rows * columns), rows, columns);
}

// The tokens' rows of a task, zeros in its padding.
template <typename T>
void gather(const MoeExpertsShape& shape, const RowTask& task, const void* source, int64_t stride, T* out) {
  const int32_t* choices = shape.choices + task.segment.first + task.begin;
  for (int64_t row = 0; row < task.filled(); ++row) {
    std::memcpy(out + row * shape.hidden_size, at<T>(source, choices[row] / shape.top_k * stride),
                shape.hidden_size * sizeof(T));
  }
  std::fill(out + task.filled() * shape.hidden_size, out + task.rows() * shape.hidden_size, T{});
}

template <typename T>
void swiglu_row(int64_t size, const T* h, T* activation) {
  for_each_vector<T>(size, [&](int64_t i, int count) {
    const Vec<T> gate = load_lanes(h + i, count), up = load_lanes(h + size + i, count);
    store_lanes(activation + i, gate / (1 + exp(-gate)) * up, count);
  });
}

// With y = weight * (activation W_down^T) and dactivation = dy W_down before the weight, dweight = <dactivation,
// activation>: the experts' outputs need not be kept. Writes weight * activation over dactivation and returns dweight.
template <typename T>
Acc<T> swiglu_backward_row(int64_t size, const T* h, Acc<T> weight, T* dactivation, T* dh) {
  Vec<T> dweight{};
  for_each_vector<T>(size, [&](int64_t i, int count) {
    const Vec<T> gate = load_lanes(h + i, count), up = load_lanes(h + size + i, count);
    const Vec<T> sigmoid = 1 / (1 + exp(-gate));
    const Vec<T> silu = gate * sigmoid;
    const Vec<T> incoming = load_lanes(dactivation + i, count);
    dweight += incoming * silu * up;
    const Vec<T> weighted = incoming * weight;
    store_lanes(dh + i, weighted * up * sigmoid * (1 + gate * (1 - sigmoid)), count);
    store_lanes(dh + size + i, weighted * silu, count);
    store_lanes(dactivation + i, silu * up * weight, count);
  });
  return reduce_add(dweight);
}

// accumulator[token] += weight * rows[row]; weights [T, K], or nullptr for 1. The rows of an expert rise with the
// token, so a thread that owns a range of tokens finds its rows by bisection, and every sum runs over the experts in
// order.
template <typename T>
void combine_wave(const MoeExpertsShape& shape, const std::vector<Segment>& segments, const T* rows,
                  const Acc<T>* weights, Acc<T>* accumulator) {
  const int64_t size = shape.hidden_size;
  parallel_for(shape.num_tokens, grain_for(size), [&](int64_t begin, int64_t end) {
    for (const Segment& segment : segments) {
      const int32_t* first = shape.choices + segment.first;
      const int32_t* last = first + segment.count;
      for (const int32_t* choice = std::lower_bound(first, last, begin * shape.top_k);
           choice < last && *choice < end * shape.top_k; ++choice) {
        const T* row = rows + (segment.begin + (choice - first)) * size;
        Acc<T>* sum = accumulator + *choice / shape.top_k * size;
        const Acc<T> weight = weights == nullptr ? 1 : weights[*choice];
        for_each_vector<Acc<T>>(size, [&](int64_t i, int count) {
          store_lanes(sum + i, load_lanes(sum + i, count) + weight * load_lanes(row + i, count), count);
        });
      }
    }
  });
}

template <typename A>
void clear(const MoeExpertsShape& shape, A* accumulator) {
  parallel_for(shape.num_tokens * shape.hidden_size, grain_for(1),
               [&](int64_t begin, int64_t end) { std::fill(accumulator + begin, accumulator + end, A{0}); });
}

template <typename T>
void round_to(const MoeExpertsShape& shape, const Acc<T>* accumulator, T* out) {
  parallel_for(shape.num_tokens * shape.hidden_size, grain_for(1), [&](int64_t begin, int64_t end) {
    for_each_vector<T>(end - begin, [&](int64_t i, int count) {
      store_lanes(out + begin + i, load_lanes(accumulator + begin + i, count), count);
    });
  });
}

template <typename T>
void forward(const MoeExpertsForwardParams& params) {
  const MoeExpertsShape& shape = params.shape;
  const int64_t d = shape.hidden_size, size = shape.intermediate_size;
  T* x = static_cast<T*>(params.scratch);
  T* h = x + shape.wave_rows * d;
  T* activation = h + shape.wave_rows * 2 * size;
  T* y = activation + shape.wave_rows * size;
  Acc<T>* accumulator = static_cast<Acc<T>*>(params.accumulator);
  clear(shape, accumulator);

  for_each_wave(shape, [&](const std::vector<Segment>& segments) {
    run_tasks(row_tasks(segments), [&](const RowTask& task) {
      const int64_t row = task.scratch_row(), expert = task.segment.expert;
      gather(shape, task, params.hidden, params.hidden_stride, x + row * d);
      shape.matmul(shape.dtype, dense_matrix(x + row * d, task.rows(), d),
                   transposed(expert_matrix<T>(params.w_gate_up, expert, 2 * size, d)),
                   dense_matrix(h + row * 2 * size, task.rows(), 2 * size));
      for (int64_t i = 0; i < task.rows(); ++i) {
        swiglu_row(size, h + (row + i) * 2 * size, activation + (row + i) * size);
      }
      if (params.h != nullptr) {
        std::memcpy(at<T>(params.h, (task.segment.first + task.begin) * 2 * size), h + row * 2 * size,
                    task.filled() * 2 * size * sizeof(T));
      }
      shape.matmul(shape.dtype, dense_matrix(activation + row * size, task.rows(), size),
                   transposed(expert_matrix<T>(params.w_down, expert, d, size)),
                   dense_matrix(y + row * d, task.rows(), d));
    });
    combine_wave(shape, segments, y, reinterpret_cast<const Acc<T>*>(params.expert_weights), accumulator);
  });
  if (params.accumulator != params.out) round_to(shape, accumulator, static_cast<T*>(params.out));
}

// The scratch memory of the backward pass, wave_rows rows each.
template <typename T>
struct BackwardScratch {
  explicit BackwardScratch(const MoeExpertsBackwardParams& params) {
    const int64_t rows = params.shape.wave_rows, d = params.shape.hidden_size, size = params.shape.intermediate_size;
    x = static_cast<T*>(params.scratch);
    dy = x + rows * d;
    dx = dy + rows * d;
    activation = dx + rows * d;
    dh = activation + rows * size;
  }
  T *x, *dy, *dx;  // [wave_rows, d]
  T* activation;   // [wave_rows, I]: its gradient before the weight, then itself times the weight
  T* dh;           // [wave_rows, 2 I]
};

template <typename T>
void backward_rows(const MoeExpertsBackwardParams& params, const RowTask& task, const BackwardScratch<T>& scratch) {
  const MoeExpertsShape& shape = params.shape;
  const int64_t d = shape.hidden_size, size = shape.intermediate_size;
  const int64_t row = task.scratch_row(), expert = task.segment.expert, first = task.segment.first + task.begin;
  gather(shape, task, params.dout, params.dout_stride, scratch.dy + row * d);
  shape.matmul(shape.dtype, dense_matrix(scratch.dy + row * d, task.rows(), d),
               expert_matrix<T>(params.w_down, expert, d, size),
               dense_matrix(scratch.activation + row * size, task.rows(), size));
  for (int64_t i = 0; i < task.filled(); ++i) {
    const int32_t choice = shape.choices[first + i];
    reinterpret_cast<Acc<T>*>(params.dexpert_weights)[choice] = swiglu_backward_row(
        size, at<T>(params.h, (first + i) * 2 * size), reinterpret_cast<const Acc<T>*>(params.expert_weights)[choice],
        scratch.activation + (row + i) * size, scratch.dh + (row + i) * 2 * size);
  }
  // The products over rows must not meet 0 * Inf in the padding.
  const int64_t filled = row + task.filled(), end = row + task.rows();
  std::fill(scratch.activation + filled * size, scratch.activation + end * size, T{});
  std::fill(scratch.dh + filled * 2 * size, scratch.dh + end * 2 * size, T{});
  if (params.dw_gate_up != nullptr) gather(shape, task, params.hidden, params.hidden_stride, scratch.x + row * d);
  if (params.dhidden != nullptr) {
    shape.matmul(shape.dtype, dense_matrix(scratch.dh + row * 2 * size, task.rows(), 2 * size),
                 expert_matrix<T>(params.w_gate_up, expert, 2 * size, d),
                 dense_matrix(scratch.dx + row * d, task.rows(), d));
  }
}

// out[e] = left^T right over the rows of each segment's expert, in blocks of rows of out [E, m, n].
template <typename T>
void weight_gradients(const MoeExpertsShape& shape, const std::vector<Segment>& segments, T* left, int64_t m, T* right,
                      int64_t n, void* out) {
  struct Block {
    Segment segment;
    int64_t begin, end;
  };
  std::vector<Block> blocks;
  for (const Segment& segment : segments) {
    for (int64_t begin = 0; begin < m; begin += kTaskRows) {
      blocks.push_back({segment, begin, std::min(begin + kTaskRows, m)});
    }
  }
  run_tasks(blocks, [&](const Block& block) {
    const Segment& segment = block.segment;
    const Matrix columns{left + segment.begin * m + block.begin, segment.padded(), block.end - block.begin, m, 1};
    shape.matmul(shape.dtype, transposed(columns), dense_matrix(right + segment.begin * n, segment.padded(), n),
                 dense_matrix(at<T>(out, (segment.expert * m + block.begin) * n), block.end - block.begin, n));
  });
}

// Experts without rows have zero gradients, which no product writes.
template <typename T>
void clear_unused_experts(const MoeExpertsShape& shape, int64_t elements_per_expert, void* gradients) {
  parallel_for(shape.num_experts, grain_for(elements_per_expert), [&](int64_t begin, int64_t end) {
    for (int64_t expert = begin; expert < end; ++expert) {
      if (shape.offsets[expert] != shape.offsets[expert + 1]) continue;
      std::fill_n(at<T>(gradients, expert * elements_per_expert), elements_per_expert, T{});
    }
  });
}

template <typename T>
void backward(const MoeExpertsBackwardParams& params) {
  const MoeExpertsShape& shape = params.shape;
  const int64_t d = shape.hidden_size, size = shape.intermediate_size;
  const BackwardScratch<T> scratch(params);
  Acc<T>* accumulator = static_cast<Acc<T>*>(params.accumulator);
  if (params.dhidden != nullptr) clear(shape, accumulator);

  for_each_wave(shape, [&](const std::vector<Segment>& segments) {
    run_tasks(row_tasks(segments), [&](const RowTask& task) { backward_rows(params, task, scratch); });
    if (params.dw_gate_up != nullptr) {
      weight_gradients(shape, segments, scratch.dh, 2 * size, scratch.x, d, params.dw_gate_up);
      weight_gradients(shape, segments, scratch.dy, d, scratch.activation, size, params.dw_down);
    }
    if (params.dhidden != nullptr) {
      combine_wave(shape, segments, scratch.dx, static_cast<const Acc<T>*>(nullptr), accumulator);
    }
  });
  if (params.dw_gate_up != nullptr) {
    clear_unused_experts<T>(shape, 2 * size * d, params.dw_gate_up);
    clear_unused_experts<T>(shape, d * size, params.dw_down);
  }
  if (params.dhidden != nullptr && params.accumulator != params.dhidden) {
    round_to(shape, accumulator, static_cast<T*>(params.dhidden));
  }
}

}  // namespace

void moe_experts_forward(const MoeExpertsForwardParams& params) {
  dispatch_dtype(params.shape.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(params); });
}

void moe_experts_backward(const MoeExpertsBackwardParams& params) {
  dispatch_dtype(params.shape.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(params); });
}

}  // namespace arfast::ARFAST_CPU_TARGET
