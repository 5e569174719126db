// A decode step of a dense model of the Llama family on the CPU (Touvron et al. 2023, arXiv 2302.13971, section 2.2),
// in one parallel region: a task is a range of rows of a weight matrix, read once for all sequences, or a key-value
// head of a sequence. Activations are float32, but that products round them to bfloat16 where the machine multiplies
// that itself. No result depends on how rows are divided into tasks.
#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "core/arena.h"
#include "core/bf16_matmul.h"
#include "core/cached_attention.h"
#include "core/logits_scan.h"
#include "core/phases.h"
#include "core/rotation.h"
#include "decode_step/decode_step.h"
#include "decode_step/matrix_vector.h"

namespace arfast::ARFAST_CPU_TARGET {
namespace {

constexpr int64_t kTaskBytes = 32 << 10;  // of weights: few enough that no thread waits long for the last task
constexpr int64_t kNormRows = 8;
constexpr int64_t kManyRows = 8;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline VecF silu(VecF x) { return x / (1 + exp(-x)); }

// x [size] * weight / sqrt(mean(x^2) + eps) -> out
template <typename T, typename X>
void normalize(const float* x, const T* weight, int64_t size, double eps, X* out) {
  VecF squares{};
  for_each_vector<float>(size, [&](int64_t i, int count) {
    const VecF v = load_lanes(x + i, count);
    squares += v * v;
  });
  const float rstd = 1 / std::sqrt(reduce_add(squares) / static_cast<float>(size) + static_cast<float>(eps));
  for_each_vector<float>(size, [&](int64_t i, int count) {
    store_lanes(out + i, load_lanes(x + i, count) * rstd * load_lanes(weight + i, count), count);
  });
}

template <typename T>
void add_to(const T* x, int64_t size, float* out) {
  for_each_vector<float>(size, [&](int64_t i, int count) {
    store_lanes(out + i, load_lanes(out + i, count) + load_lanes(x + i, count), count);
  });
}

template <typename T, typename U>
void convert(const T* x, int64_t size, U* out) {
  for_each_vector<float>(size, [&](int64_t i, int count) { store_lanes(out + i, load_lanes(x + i, count), count); });
}

// The rows of a few matrices [., depth], one after the other, as tasks of whole blocks of the products that share them.
template <typename T>
class RowTasks {
 public:
  struct Matrix {
    const void* weight;
    int64_t rows;
  };
  // What a task multiplies: rows [begin, end) of a matrix.
  struct Rows {
    int matrix;
    int64_t begin, end;
  };

  // together: how many matrices a task reads the same rows of.
  RowTasks(int64_t depth, std::initializer_list<Matrix> matrices, int64_t together = 1) : depth_(depth) {
    const int64_t bytes = together * depth * static_cast<int64_t>(sizeof(T));
    block_ = std::max<int64_t>(kTaskBytes / bytes / kFloatLanes, 1) * kFloatLanes;
    for (const Matrix& matrix : matrices) matrices_[num_matrices_++] = matrix;
  }

  int64_t block() const { return block_; }
  int64_t count() const {
    int64_t count = 0;
    for (int i = 0; i < num_matrices_; ++i) count += tasks_of(i);
    return count;
  }
  Rows rows(int64_t task) const {
    int i = 0;
    for (; i + 1 < num_matrices_ && task >= tasks_of(i); ++i) task -= tasks_of(i);
    const int64_t rows = matrices_[i].rows;
    return {i, std::min(task * block_, rows), std::min((task + 1) * block_, rows)};
  }
  const T* weight(int matrix) const { return static_cast<const T*>(matrices_[matrix].weight); }
  // The first weight of a task.
  const T* begin(int64_t task) const {
    const Rows rows = this->rows(task);
    return weight(rows.matrix) + rows.begin * depth_;
  }

 private:
  int64_t tasks_of(int matrix) const { return divide_up(matrices_[matrix].rows, block_); }

  Matrix matrices_[3];
  int num_matrices_ = 0;
  int64_t depth_, block_;
};

// Everything that the threads share. X: what vectors are multiplied in, see multiply_rows.
template <typename T, typename X>
class DecodeStep {
 public:
  explicit DecodeStep(const DecodeStepParams& params)
      : params_(params),
        q_size_(params.num_heads * params.head_dim),
        kv_size_(params.num_kv_heads * params.head_dim),
        qkv_size_(q_size_ + 2 * kv_size_),
        size_(params.hidden_size),
        wide_(params.intermediate_size),
        num_rows_(params.batch * params.num_tokens),
        arena_(params.batch * params.num_tokens *
               (3 * padded(size_) + padded(qkv_size_) + padded(q_size_) + 3 * padded(wide_))),
        hidden_(take(size_)),
        update_(take(size_)),
        normed_(take<X>(size_)),
        qkv_(take(qkv_size_)),
        attended_(take<X>(q_size_)),
        gate_(take(wide_)),
        up_(take(wide_)),
        gated_(take<X>(wide_)) {}

  void run() {
    const int64_t most = std::max({head_rows().count(), params_.batch * params_.num_kv_heads,
                                   params_.num_layers > 0 ? gate_rows(params_.layers[0]).count() : 0});
    run_phases(std::min(params_.num_threads, most), [&](Phases& phases) {
      for (int64_t layer = 0; layer < params_.num_layers; ++layer) {
        const DecodeStepLayer& weights = params_.layers[layer];
        norm(phases, weights.input_norm, nullptr, layer == 0);
        project_qkv(phases, weights);
        phases.run(params_.batch * params_.num_kv_heads,
                   [&](int64_t task) { attend(layer, task / params_.num_kv_heads, task % params_.num_kv_heads); });
        project(phases, o_rows(weights), attended_, q_size_, begin(phases, gate_rows(weights)));
        norm(phases, weights.post_norm, weights.o_bias, false);
        gate(phases, weights);
        const bool last = layer + 1 == params_.num_layers;
        project(phases, down_rows(weights), gated_, wide_,
                begin(phases, last ? head_rows() : qkv_rows(params_.layers[layer + 1])));
      }
      norm(phases, params_.norm, nullptr, params_.num_layers == 0);
      project_logits(phases);
    });
  }

 private:
  struct LogitsTile;

  static int64_t padded(int64_t size) { return Arena<float>::padded(size); }
  template <typename U = float>
  U* take(int64_t size) {
    return reinterpret_cast<U*>(arena_.take(num_rows_ * padded(size)));
  }
  template <typename U>
  static U* row_of(U* buffer, int64_t row, int64_t size) {
    return buffer + row * padded(size);
  }

  RowTasks<T> qkv_rows(const DecodeStepLayer& weights) const {
    return {size_, {{weights.q, q_size_}, {weights.k, kv_size_}, {weights.v, kv_size_}}};
  }
  RowTasks<T> o_rows(const DecodeStepLayer& weights) const { return {q_size_, {{weights.o, size_}}}; }
  RowTasks<T> gate_rows(const DecodeStepLayer& weights) const { return {size_, {{weights.gate, wide_}}, 2}; }
  RowTasks<T> down_rows(const DecodeStepLayer& weights) const { return {wide_, {{weights.down, size_}}}; }
  RowTasks<T> head_rows() const { return {size_, {{params_.head, params_.vocab_size}}}; }

  // The weight that this thread will read first of a phase.
  static const T* begin(const Phases& phases, const RowTasks<T>& rows) {
    return rows.begin(phases.own_share(rows.count()).begin);
  }
  // The weight that it reads after a task of the phase; `next` after its last one.
  static const T* after(const Phases& phases, const RowTasks<T>& rows, int64_t task, const T* next) {
    return task + 1 == phases.own_share(rows.count()).end ? next : rows.begin(task + 1);
  }

  void multiply(const WeightRows<T>& weight, const X* x, float* out, int64_t out_stride) const {
    multiply_rows<T, X>(weight, x, padded(weight.depth), num_rows_, out, out_stride);
  }

  // hidden += update + bias (or the embedding at first); normed = norm(hidden)
  void norm(Phases& phases, const void* weight, const void* bias, bool first) {
    phases.run(divide_up(num_rows_, kNormRows), [&](int64_t task) {
      for (int64_t b = task * kNormRows; b < std::min((task + 1) * kNormRows, num_rows_); ++b) {
        float* hidden = row_of(hidden_, b, size_);
        if (first) {
          convert(static_cast<const T*>(params_.embedding) + params_.tokens[b] * size_, size_, hidden);
        } else {
          add_to(row_of(update_, b, size_), size_, hidden);
          if (bias != nullptr) add_to(static_cast<const T*>(bias), size_, hidden);
        }
        normalize(hidden, static_cast<const T*>(weight), size_, params_.eps, row_of(normed_, b, size_));
      }
    });
  }

  void project_qkv(Phases& phases, const DecodeStepLayer& weights) {
    const RowTasks<T> rows = qkv_rows(weights);
    const T* next = begin(phases, o_rows(weights));
    const void* const biases[] = {weights.q_bias, weights.k_bias, weights.v_bias};
    const int64_t offsets[] = {0, q_size_, q_size_ + kv_size_};
    phases.run(rows.count(), [&](int64_t task) {
      const auto [i, begin, end] = rows.rows(task);
      float* out = qkv_ + offsets[i];
      multiply({rows.weight(i), size_, begin, end, after(phases, rows, task, next)}, normed_, out, padded(qkv_size_));
      if (biases[i] == nullptr) return;
      for (int64_t b = 0; b < num_rows_; ++b) {
        add_to(static_cast<const T*>(biases[i]) + begin, end - begin, out + b * padded(qkv_size_) + begin);
      }
    });
  }

  // update = weight x
  void project(Phases& phases, const RowTasks<T>& rows, const X* x, int64_t depth, const T* next) {
    phases.run(rows.count(), [&](int64_t task) {
      const auto [i, begin, end] = rows.rows(task);
      multiply({rows.weight(i), depth, begin, end, after(phases, rows, task, next)}, x, update_, padded(size_));
    });
  }

  // gated = silu(gate_proj normed) * up_proj normed
  void gate(Phases& phases, const DecodeStepLayer& weights) {
    const RowTasks<T> rows = gate_rows(weights);
    const T *up_proj = static_cast<const T*>(weights.up), *next = begin(phases, down_rows(weights));
    phases.run(rows.count(), [&](int64_t task) {
      const auto [i, begin, end] = rows.rows(task);
      multiply({rows.weight(i), size_, begin, end, up_proj + begin * size_}, normed_, gate_, padded(wide_));
      multiply({up_proj, size_, begin, end, after(phases, rows, task, next)}, normed_, up_, padded(wide_));
      for (int64_t b = 0; b < num_rows_; ++b) {
        const float* gate = row_of(gate_, b, wide_) + begin;
        const float* up = row_of(up_, b, wide_) + begin;
        X* out = row_of(gated_, b, wide_) + begin;
        for_each_vector<float>(end - begin, [&](int64_t i, int count) {
          store_lanes(out + i, silu(load_lanes(gate + i, count)) * load_lanes(up + i, count), count);
        });
      }
    });
  }

  // Of many rows a task computes whole tiles of columns: the fewer cache lines of the logits are two tasks'.
  void project_logits(Phases& phases) {
    const int64_t block = head_rows().block();
    const int64_t columns = num_rows_ >= kManyRows || params_.tile_sums != nullptr ? kTile : block;
    phases.run(divide_up(params_.vocab_size, columns), [&](int64_t task) {
      const int64_t begin = task * columns, end = std::min(begin + columns, params_.vocab_size);
      for (int64_t i = begin; i < end; i += block) project_logits(i, std::min(i + block, end));
      if (params_.tile_sums != nullptr) sum_columns(begin, end - begin);
    });
  }

  void project_logits(int64_t begin, int64_t end) const {
    const int64_t vocab_size = params_.vocab_size;
    const T* head = static_cast<const T*>(params_.head);
    T* logits = static_cast<T*>(params_.logits);
    if constexpr (std::is_same_v<T, float>) {
      multiply({head, size_, begin, end, head + end * size_}, normed_, logits, vocab_size);
    } else {
      const int64_t stride = padded(end - begin);
      float* tile = thread_scratch<float, LogitsTile>(num_rows_ * stride);
      multiply({head + begin * size_, size_, 0, end - begin, head + end * size_}, normed_, tile, stride);
      for (int64_t b = 0; b < num_rows_; ++b) {
        convert(tile + b * stride, end - begin, logits + b * vocab_size + begin);
      }
    }
  }

  // The maxima and sums of a tile of every row.
  void sum_columns(int64_t begin, int64_t count) const {
    float* maxima = params_.tile_sums + begin / kTile * num_rows_;
    float* sums = maxima + num_logits_tiles(params_.vocab_size) * num_rows_;
    for (int64_t b = 0; b < num_rows_; b += kFloatLanes) {
      const T* logits = static_cast<const T*>(params_.logits) + b * params_.vocab_size + begin;
      const int rows = static_cast<int>(std::min<int64_t>(kFloatLanes, num_rows_ - b));
      sum_tiles(logits, params_.vocab_size, rows, count, maxima + b, sums + b);
    }
  }

  // RMSNorm of a head if there is one, and its rotation to the position, both in place.
  void prepare_head(float* head, const void* norm, int64_t position) const {
    const int64_t half = params_.head_dim / 2;
    if (norm != nullptr) normalize(head, static_cast<const T*>(norm), params_.head_dim, params_.eps, head);
    rotate_head(head, params_.cos + position * half, params_.sin + position * half, half, false, head);
  }

  // A head of one layer in the caches.
  struct CachedHead {
    T *k, *v;
    const DecodeStepCache &k_cache, &v_cache;
    const int32_t* slots;  // of the sequence, or nullptr
    int64_t sequence;

    int64_t row(int64_t position) const { return slots == nullptr ? sequence : slots[position]; }
    T* key(int64_t row, int64_t position) const {
      return k + row * k_cache.batch_stride + position * k_cache.row_stride;
    }
    T* value(int64_t row, int64_t position) const {
      return v + row * v_cache.batch_stride + position * v_cache.row_stride;
    }
  };
  CachedHead cached_head(int64_t layer, int64_t sequence, int64_t head) const {
    const auto at = [&](const DecodeStepCache& cache) {
      return static_cast<T*>(cache.data) + layer * cache.layer_stride + head * cache.head_stride;
    };
    const int32_t* slots = params_.beam_slots;
    if (slots != nullptr) slots += sequence * params_.slots_stride;
    return {at(params_.k_cache), at(params_.v_cache), params_.k_cache, params_.v_cache, slots, sequence};
  }

  // Stores the new keys and values of a head, then lets the queries that share it attend, token by token.
  void attend(int64_t layer, int64_t sequence, int64_t kv_head) {
    const CachedHead cached = cached_head(layer, sequence, kv_head);
    const int64_t first_row = sequence * params_.num_tokens, first = params_.seqlens[sequence] - params_.num_tokens;
    for (int64_t t = 0; t < params_.num_tokens; ++t)
      store(params_.layers[layer], first_row + t, first + t, kv_head, cached);
    for (int64_t t = 0; t < params_.num_tokens; ++t)
      attend(params_.layers[layer], first_row + t, first + t, kv_head, cached);
  }

  void store(const DecodeStepLayer& weights, int64_t row, int64_t position, int64_t kv_head, const CachedHead& cached) {
    const int64_t head_dim = params_.head_dim, slot = cached.row(position);
    float* k = row_of(qkv_, row, qkv_size_) + q_size_ + kv_head * head_dim;
    prepare_head(k, weights.k_norm, position);
    convert(k, head_dim, cached.key(slot, position));
    convert(k + kv_size_, head_dim, cached.value(slot, position));
  }

  void attend(const DecodeStepLayer& weights, int64_t row, int64_t position, int64_t kv_head,
              const CachedHead& cached) {
    const int64_t head_dim = params_.head_dim, group = params_.num_heads / params_.num_kv_heads;
    float* q = row_of(qkv_, row, qkv_size_) + kv_head * group * head_dim;
    CachedAttention<T> attention(group, head_dim, 1 / std::sqrt(static_cast<double>(head_dim)), 0);
    for (int64_t i = 0; i < group; ++i) {
      prepare_head(q + i * head_dim, weights.q_norm, position);
      attention.set_query(i, q + i * head_dim);
    }
    const int64_t first = weights.window < 0 ? 0 : std::max<int64_t>(position - weights.window, 0);
    for (int64_t key = first; key <= position; key += kCachedTile) {
      const T *keys[kCachedTile], *values[kCachedTile];
      const int64_t count = std::min(kCachedTile, position + 1 - key);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t slot = cached.row(key + i);
        keys[i] = cached.key(slot, key + i);
        values[i] = cached.value(slot, key + i);
      }
      attention.visit(keys, values, count, [](int64_t) { return int64_t{0}; }, [&](int64_t) { return count - 1; });
    }
    X* out = row_of(attended_, row, q_size_) + kv_head * group * head_dim;
    for (int64_t i = 0; i < group; ++i, out += head_dim) {
      const float inverse = 1 / attention.sum(i);
      for_each_vector<float>(head_dim, [&](int64_t j, int count) {
        store_lanes(out + j, load_lanes(attention.out(i) + j, count) * inverse, count);
      });
    }
  }

  const DecodeStepParams& params_;
  const int64_t q_size_, kv_size_, qkv_size_, size_, wide_;
  const int64_t num_rows_;  // R = B T, of all activations
  Arena<float, DecodeStep> arena_;
  float *hidden_, *update_;  // [R, d]
  X* normed_;                // [R, d]
  float* qkv_;               // [R, (H + 2 Hkv) D]
  X* attended_;              // [R, H D]
  float *gate_, *up_;        // [R, I]
  X* gated_;                 // [R, I]
};

}  // namespace

void decode_step(const DecodeStepParams& params) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (has_bf16_products()) return DecodeStep<T, BFloat16>(params).run();
    }
#endif
    if constexpr (!std::is_same_v<T, double>) DecodeStep<T, float>(params).run();
  });
}

}  // namespace arfast::ARFAST_CPU_TARGET
