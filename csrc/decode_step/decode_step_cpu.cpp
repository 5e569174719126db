// A decode step of a dense model of the Llama family on the CPU (Touvron et al. 2023, arXiv 2302.13971, section 2.2),
// in one parallel region: a task is a range of rows of a weight matrix, read once for all sequences, or a key-value
// head of a sequence. Activations are float32, but that products round them to bfloat16 where the machine multiplies
// that itself. No result depends on how rows are divided into tasks.
#include <algorithm>
#include <cmath>

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

// Of weights in a task: few enough that no thread waits long for the last one. Where reading them is all the work, many
// enough that a thread seldom fetches ahead what another one will read: two threads read 200 MB of float32 at 22 GB/s
// in tasks of 32 KB, at 28 to 30 in tasks of 256 KB, 100 MB of bfloat16 at 33 and 43 (Granite Rapids, November 2026).
constexpr int64_t kLeastTaskBytes = 32 << 10, kMostTaskBytes = 256 << 10, kTasksPerThread = 4;
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

// Rows of a matrix [count, depth] as tasks, whole blocks of the products that share them.
template <typename T>
struct RowTasks {
  int64_t count, rows;

  RowTasks(const DecodeStepParams& params, int64_t count_, int64_t depth, int64_t matrices = 1) : count(count_) {
    const int64_t bytes = matrices * depth * static_cast<int64_t>(sizeof(T));
    const int64_t most = params.batch * params.num_tokens < kManyRows ? kMostTaskBytes : kLeastTaskBytes;
    const int64_t share = count * bytes / (kTasksPerThread * params.num_threads);
    rows = std::max<int64_t>(std::clamp(share, kLeastTaskBytes, most) / bytes / kFloatLanes, 1) * kFloatLanes;
  }
  int64_t tasks() const { return divide_up(count, rows); }
  int64_t begin(int64_t task) const { return task * rows; }
  int64_t end(int64_t task) const { return std::min((task + 1) * rows, count); }
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
    const int64_t most =
        std::max({RowTasks<T>(params_, params_.vocab_size, size_).tasks(),
                  RowTasks<T>(params_, wide_, size_, 2).tasks(), params_.batch * params_.num_kv_heads});
    run_phases(most, [&](Phases& phases) {
      for (int64_t layer = 0; layer < params_.num_layers; ++layer) {
        const DecodeStepLayer& weights = params_.layers[layer];
        norm(phases, weights.input_norm, nullptr, layer == 0);
        project_qkv(phases, weights);
        phases.run(params_.batch * params_.num_kv_heads,
                   [&](int64_t task) { attend(layer, task / params_.num_kv_heads, task % params_.num_kv_heads); });
        project(phases, weights.o, attended_, q_size_);
        norm(phases, weights.post_norm, weights.o_bias, false);
        gate(phases, weights);
        project(phases, weights.down, gated_, wide_);
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

  void multiply(const void* weight, int64_t depth, int64_t begin, int64_t end, const X* x, float* out,
                int64_t out_stride) const {
    multiply_rows<T, X>({static_cast<const T*>(weight), depth, begin, end}, x, padded(depth), num_rows_, out,
                        out_stride);
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
    const RowTasks<T> q(params_, q_size_, size_), kv(params_, kv_size_, size_);
    phases.run(q.tasks() + 2 * kv.tasks(), [&](int64_t task) {
      const bool is_q = task < q.tasks(), is_v = task >= q.tasks() + kv.tasks();
      const RowTasks<T>& rows = is_q ? q : kv;
      const int64_t index = task - (is_q ? 0 : q.tasks()) - (is_v ? kv.tasks() : 0);
      const int64_t begin = rows.begin(index), end = rows.end(index);
      float* out = qkv_ + (is_q ? 0 : q_size_) + (is_v ? kv_size_ : 0);
      multiply(is_q ? weights.q : is_v ? weights.v : weights.k, size_, begin, end, normed_, out, padded(qkv_size_));
      const void* bias = is_q ? weights.q_bias : is_v ? weights.v_bias : weights.k_bias;
      if (bias == nullptr) return;
      for (int64_t b = 0; b < num_rows_; ++b) {
        add_to(static_cast<const T*>(bias) + begin, end - begin, out + b * padded(qkv_size_) + begin);
      }
    });
  }

  // update = weight x
  void project(Phases& phases, const void* weight, const X* x, int64_t depth) {
    const RowTasks<T> rows(params_, size_, depth);
    phases.run(rows.tasks(), [&](int64_t task) {
      multiply(weight, depth, rows.begin(task), rows.end(task), x, update_, padded(size_));
    });
  }

  // gated = silu(gate_proj normed) * up_proj normed
  void gate(Phases& phases, const DecodeStepLayer& weights) {
    const RowTasks<T> rows(params_, wide_, size_, 2);
    phases.run(rows.tasks(), [&](int64_t task) {
      const int64_t begin = rows.begin(task), end = rows.end(task);
      multiply(weights.gate, size_, begin, end, normed_, gate_, padded(wide_));
      multiply(weights.up, size_, begin, end, normed_, up_, padded(wide_));
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
    const int64_t block = RowTasks<T>(params_, params_.vocab_size, size_).rows;
    const int64_t columns = num_rows_ >= kManyRows || params_.tile_sums != nullptr ? kTile : block;
    phases.run(divide_up(params_.vocab_size, columns), [&](int64_t task) {
      const int64_t begin = task * columns, end = std::min(begin + columns, params_.vocab_size);
      for (int64_t i = begin; i < end; i += block) project_logits(i, std::min(i + block, end));
      if (params_.tile_sums != nullptr) sum_columns(begin, end - begin);
    });
  }

  void project_logits(int64_t begin, int64_t end) const {
    const int64_t vocab_size = params_.vocab_size;
    T* logits = static_cast<T*>(params_.logits);
    if constexpr (std::is_same_v<T, float>) {
      multiply(params_.head, size_, begin, end, normed_, logits, vocab_size);
    } else {
      const int64_t stride = padded(end - begin);
      float* tile = thread_scratch<float, LogitsTile>(num_rows_ * stride);
      multiply(static_cast<const T*>(params_.head) + begin * size_, size_, 0, end - begin, normed_, tile, stride);
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
