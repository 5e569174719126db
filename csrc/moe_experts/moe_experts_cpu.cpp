// SwiGLU experts on the CPU (Shazeer 2020, arXiv 2002.05202, equation 6, in a mixture of experts). The rows pass
// through in waves of a few experts, small enough for the cache: nothing of [T * K, ...] but the saved pre-activations
// is ever in memory. Tasks are blocks of rows or of weight rows whose bounds depend on the routing alone, each on one
// thread, so the result does not depend on how many there are.
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "core/simd.h"
#include "core/tasks.h"
#include "moe_experts/moe_experts.h"
#include "moe_experts/waves.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

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

int64_t combine_tasks(const MoeExpertsShape& shape) { return (shape.num_tokens + kTaskRows - 1) / kTaskRows; }

// accumulator[token] += weight * rows[row] for the tokens of one task and all their rows of the wave; weights [T, K],
// or nullptr for 1. The rows of an expert rise with the token, so bisection finds them, and every sum runs over the
// experts in order.
template <typename T>
void combine(const MoeExpertsShape& shape, const std::vector<Segment>& segments, int64_t task, const T* rows,
             const Acc<T>* weights, Acc<T>* accumulator) {
  const int64_t size = shape.hidden_size, begin = task * kTaskRows;
  const int64_t end = std::min(begin + kTaskRows, shape.num_tokens);
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
struct ForwardScratch {
  explicit ForwardScratch(const MoeExpertsForwardParams& params) {
    const int64_t rows = params.shape.wave_rows, d = params.shape.hidden_size, size = params.shape.intermediate_size;
    x = static_cast<T*>(params.scratch);
    y = x + rows * d;
    h = y + rows * d;
    activation = h + rows * 2 * size;
  }
  T *x, *y;       // [wave_rows, d]
  T* h;           // [wave_rows, 2 I]
  T* activation;  // [wave_rows, I]
};

template <typename T>
void forward_rows(const MoeExpertsForwardParams& params, const RowTask& task, const ForwardScratch<T>& scratch) {
  const MoeExpertsShape& shape = params.shape;
  const int64_t d = shape.hidden_size, size = shape.intermediate_size;
  const int64_t row = task.scratch_row(), expert = task.segment.expert;
  T* kept = params.h == nullptr ? nullptr : at<T>(params.h, (task.segment.first + task.begin) * 2 * size);
  // Padding must not fall on the rows that the next expert keeps.
  T* h = kept != nullptr && task.filled() == task.rows() ? kept : scratch.h + row * 2 * size;
  T* activation = scratch.activation + row * size;
  gather(shape, task, params.hidden, params.hidden_stride, scratch.x + row * d);
  shape.matmul({shape.dtype, dense_matrix(scratch.x + row * d, task.rows(), d),
                transposed(expert_matrix<T>(params.w_gate_up, expert, 2 * size, d)),
                dense_matrix(h, task.rows(), 2 * size)});
  for (int64_t i = 0; i < task.rows(); ++i) swiglu_row(size, h + i * 2 * size, activation + i * size);
  if (kept != nullptr && h != kept) std::memcpy(kept, h, task.filled() * 2 * size * sizeof(T));
  shape.matmul({shape.dtype, dense_matrix(activation, task.rows(), size),
                transposed(expert_matrix<T>(params.w_down, expert, d, size)),
                dense_matrix(scratch.y + row * d, task.rows(), d)});
}

template <typename T>
void forward(const MoeExpertsForwardParams& params) {
  const MoeExpertsShape& shape = params.shape;
  const ForwardScratch<T> scratch(params);
  const auto* weights = reinterpret_cast<const Acc<T>*>(params.expert_weights);
  Acc<T>* accumulator = static_cast<Acc<T>*>(params.accumulator);
  clear(shape, accumulator);
  for_each_wave(shape, [&](const std::vector<Segment>& segments) {
    const std::vector<RowTask> tasks = row_tasks(segments);
    run_tasks(tasks.size(), [&](int64_t i) { forward_rows(params, tasks[i], scratch); });
    run_tasks(combine_tasks(shape), [&](int64_t i) { combine(shape, segments, i, scratch.y, weights, accumulator); });
  });
  if (params.accumulator != params.out) round_to(shape, accumulator, static_cast<T*>(params.out));
}

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
  shape.matmul({shape.dtype, dense_matrix(scratch.dy + row * d, task.rows(), d),
                expert_matrix<T>(params.w_down, expert, d, size),
                dense_matrix(scratch.activation + row * size, task.rows(), size)});
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
    shape.matmul({shape.dtype, dense_matrix(scratch.dh + row * 2 * size, task.rows(), 2 * size),
                  expert_matrix<T>(params.w_gate_up, expert, 2 * size, d),
                  dense_matrix(scratch.dx + row * d, task.rows(), d)});
  }
}

// Rows [begin, end) of one expert's dw_gate_up (2 I rows) or dw_down (d rows).
struct WeightTask {
  Segment segment;
  bool down;
  int64_t begin, end;
};

std::vector<WeightTask> weight_tasks(const MoeExpertsShape& shape, const std::vector<Segment>& segments) {
  std::vector<WeightTask> tasks;
  for (const Segment& segment : segments) {
    for (const bool down : {false, true}) {
      const int64_t rows = down ? shape.hidden_size : 2 * shape.intermediate_size;
      for (int64_t begin = 0; begin < rows; begin += kWeightTaskRows) {
        tasks.push_back({segment, down, begin, std::min(begin + kWeightTaskRows, rows)});
      }
    }
  }
  return tasks;
}

// dw_gate_up = dh^T x and dw_down = dy^T (weight * activation), over the rows of an expert.
template <typename T>
void weight_gradient(const MoeExpertsBackwardParams& params, const WeightTask& task,
                     const BackwardScratch<T>& scratch) {
  const int64_t d = params.shape.hidden_size, size = params.shape.intermediate_size;
  const int64_t m = task.down ? d : 2 * size, n = task.down ? size : d;
  const Segment& segment = task.segment;
  T* left = (task.down ? scratch.dy : scratch.dh) + segment.begin * m + task.begin;
  T* right = (task.down ? scratch.activation : scratch.x) + segment.begin * n;
  T* out = at<T>(task.down ? params.dw_down : params.dw_gate_up, (segment.expert * m + task.begin) * n);
  const Matrix columns{left, segment.padded(), task.end - task.begin, m, 1};
  params.shape.matmul({params.shape.dtype, transposed(columns), dense_matrix(right, segment.padded(), n),
                       dense_matrix(out, task.end - task.begin, n)});
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
    const std::vector<RowTask> rows = row_tasks(segments);
    run_tasks(rows.size(), [&](int64_t i) { backward_rows(params, rows[i], scratch); });
    std::vector<WeightTask> weights;
    if (params.dw_gate_up != nullptr) weights = weight_tasks(shape, segments);
    const int64_t num_weights = weights.size(), num_combine = params.dhidden == nullptr ? 0 : combine_tasks(shape);
    run_tasks(num_weights + num_combine, [&](int64_t i) {
      if (i < num_weights) return weight_gradient(params, weights[i], scratch);
      combine(shape, segments, i - num_weights, scratch.dx, static_cast<const Acc<T>*>(nullptr), accumulator);
    });
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
