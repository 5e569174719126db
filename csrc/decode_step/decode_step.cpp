// Binding of decode_step: schema, checks, allocation.
#include "decode_step/decode_step.h"

#include <algorithm>
#include <limits>

#include "binding/decoding.h"

namespace arfast {
namespace {

constexpr const char* kOp = "decode_step";

// The weights in the order of the list, each checked when it is taken.
class Weights {
 public:
  explicit Weights(const std::vector<Tensor>& weights) : weights_(weights) {}

  // Text is made for errors alone: a model has hundreds of weights, and all are checked in every step.
  const void* take(const char* name, const char* names, std::initializer_list<int64_t> sizes) {
    const Tensor& weight = next(name);
    check_shape(kOp, name, weight, names, sizes);
    check_same_dtype(kOp, name, weight, "embed_tokens", weights_[0]);
    if (!weight.is_cpu()) fail(kOp, name, "be on the CPU", device_of(weight));
    if (!weight.is_contiguous()) fail(kOp, name, "be contiguous", "strides that are not");
    return weight.data_ptr();
  }
  void finish() const {
    if (index_ != weights_.size()) {
      fail(kOp, "weights", "hold no more than the model has", std::to_string(weights_.size()));
    }
  }

 private:
  const Tensor& next(const char* name) {
    if (index_ == weights_.size()) {
      fail(kOp, "weights", std::string("go on with ") + name, std::to_string(index_) + " tensors");
    }
    return weights_[index_++];
  }

  const std::vector<Tensor>& weights_;
  size_t index_ = 0;
};

struct Options {
  bool qkv_bias, o_bias, qk_norm;
};

DecodeStepLayer take_layer(Weights& weights, const DecodeStepParams& p, const Options& options, int64_t window) {
  const int64_t d = p.hidden_size, q = p.num_heads * p.head_dim, kv = p.num_kv_heads * p.head_dim;
  DecodeStepLayer layer{};
  layer.window = window;
  layer.input_norm = weights.take("input_layernorm", "[d]", {d});
  layer.q = weights.take("q_proj", "[H D, d]", {q, d});
  layer.k = weights.take("k_proj", "[Hkv D, d]", {kv, d});
  layer.v = weights.take("v_proj", "[Hkv D, d]", {kv, d});
  layer.o = weights.take("o_proj", "[d, H D]", {d, q});
  layer.post_norm = weights.take("post_attention_layernorm", "[d]", {d});
  layer.gate = weights.take("gate_proj", "[I, d]", {p.intermediate_size, d});
  if (p.intermediate_size == 0) fail(kOp, "gate_proj", "have at least one row", "[0, " + std::to_string(d) + "]");
  layer.up = weights.take("up_proj", "[I, d]", {p.intermediate_size, d});
  layer.down = weights.take("down_proj", "[d, I]", {d, p.intermediate_size});
  if (options.qkv_bias) {
    layer.q_bias = weights.take("q_proj.bias", "[H D]", {q});
    layer.k_bias = weights.take("k_proj.bias", "[Hkv D]", {kv});
    layer.v_bias = weights.take("v_proj.bias", "[Hkv D]", {kv});
  }
  if (options.o_bias) layer.o_bias = weights.take("o_proj.bias", "[d]", {d});
  if (options.qk_norm) {
    layer.q_norm = weights.take("q_norm", "[D]", {p.head_dim});
    layer.k_norm = weights.take("k_norm", "[D]", {p.head_dim});
  }
  return layer;
}

const float* check_table(const char* argument, const Tensor& table, int64_t positions, int64_t half) {
  check_shape(kOp, argument, table, "[positions, D / 2]", {positions, half});
  check_dtype(kOp, argument, table, ScalarType::Float);
  if (!table.is_contiguous()) fail(kOp, argument, "be contiguous", "strides that are not");
  return static_cast<const float*>(table.data_ptr());
}

DecodeStepCache check_cache(const char* argument, const Tensor& cache, std::initializer_list<int64_t> sizes,
                            const Tensor& embedding) {
  check_shape(kOp, argument, cache, "[L, rows, S, Hkv, D]", sizes);
  check_same_dtype(kOp, argument, cache, "embed_tokens", embedding);
  check_same_device(kOp, argument, cache, "embed_tokens", embedding);
  if (cache.size(4) > 1 && cache.stride(4) != 1) {
    fail(kOp, argument, "have dense channels", "a stride of " + std::to_string(cache.stride(4)));
  }
  return {cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2), cache.stride(3)};
}

void check_tokens(const DecodeStepParams& params) {
  for (int64_t i = 0; i < params.batch * params.num_tokens; ++i) {
    if (params.tokens[i] >= 0 && params.tokens[i] < params.vocab_size) continue;
    fail(kOp, "tokens", "be in [0, vocab_size=" + std::to_string(params.vocab_size) + ")",
         std::to_string(params.tokens[i]) + " at position " + std::to_string(i));
  }
}

// Lengths and slots that lie within the caches and the rotary tables.
void check_places(const DecodeStepParams& params, int64_t rows, int64_t capacity) {
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t seqlen = params.seqlens[b];
    if (seqlen < params.num_tokens || seqlen > capacity) {
      const std::string range = std::to_string(params.num_tokens) + ", " + std::to_string(capacity);
      fail(kOp, "seqlens", "be in [" + range + "], the new tokens and what caches and rotary tables hold",
           std::to_string(seqlen) + " at position " + std::to_string(b));
    }
    if (params.beam_slots == nullptr) continue;
    const int32_t* slots = params.beam_slots + b * params.slots_stride;
    int32_t low = 0, high = 0;
    for (int64_t position = 0; position < seqlen; ++position) {
      low = std::min(low, slots[position]);
      high = std::max(high, slots[position]);
    }
    if (low < 0 || high >= rows) {
      fail(kOp, "beam_slots", "be in [0, " + std::to_string(rows) + ")",
           std::to_string(low < 0 ? low : high) + " for sequence " + std::to_string(b));
    }
  }
}

// The sizes of a step, from the shapes that all others must agree with.
DecodeStepParams checked_sizes(const Tensor& tokens, const std::vector<Tensor>& list, const Tensor& k_cache,
                               int64_t num_heads) {
  if (list.size() < 3) {
    fail(kOp, "weights", "begin with embed_tokens, norm and lm_head", std::to_string(list.size()) + " tensors");
  }
  const Tensor& embedding = list[0];
  if (!embedding.is_cpu()) fail(kOp, "weights", "be on the CPU", device_of(embedding));
  check_shape(kOp, "embed_tokens", embedding, "[V, d]", {kAny, kAny});
  if (embedding.size(1) == 0) fail(kOp, "embed_tokens", "have at least one column", shape_of(embedding));
  check_shape(kOp, "k_cache", k_cache, "[L, rows, S, Hkv, D]", {kAny, kAny, kAny, kAny, kAny});
  const bool several = tokens.dim() == 2;
  if (several) {
    check_shape(kOp, "tokens", tokens, "[B, T]", {kAny, kAny});
  } else {
    check_shape(kOp, "tokens", tokens, "[B] or [B, T]", {kAny});
  }
  check_dtype(kOp, "tokens", tokens, ScalarType::Long);
  check_same_device(kOp, "tokens", tokens, "embed_tokens", embedding);

  DecodeStepParams params{};
  params.dtype = float_dtype(kOp, "embed_tokens", embedding);
  params.batch = tokens.size(0);
  params.num_threads = torch::stable::get_num_threads();
  params.num_tokens = several ? tokens.size(1) : 1;
  params.hidden_size = embedding.size(1);
  params.intermediate_size = list.size() > 9 && list[9].dim() == 2 ? list[9].size(0) : 0;
  params.vocab_size = embedding.size(0);
  params.num_layers = k_cache.size(0);
  params.num_heads = num_heads;
  params.num_kv_heads = k_cache.size(3);
  params.head_dim = k_cache.size(4);
  if (params.dtype == DType::kFloat64) fail(kOp, "embed_tokens", "be float32, bfloat16 or float16", "float64");
  if (params.head_dim <= 0 || params.head_dim % 2 != 0) {
    fail(kOp, "k_cache", "have an even head_dim", std::to_string(params.head_dim));
  }
  if (params.num_kv_heads <= 0 || num_heads <= 0 || num_heads % params.num_kv_heads != 0) {
    fail(kOp, "num_heads", "be a multiple of the " + std::to_string(params.num_kv_heads) + " key-value heads",
         std::to_string(num_heads));
  }
  return params;
}

// Of the layers; those of the whole model go to `params`.
std::vector<DecodeStepLayer> take_weights(const std::vector<Tensor>& list, const std::vector<int64_t>& windows,
                                          const Options& options, DecodeStepParams& params) {
  if (static_cast<int64_t>(windows.size()) != params.num_layers) {
    fail(kOp, "windows", "have one entry for each of " + std::to_string(params.num_layers) + " layers",
         std::to_string(windows.size()));
  }
  Weights weights(list);
  params.embedding = weights.take("embed_tokens", "[V, d]", {params.vocab_size, params.hidden_size});
  params.norm = weights.take("norm", "[d]", {params.hidden_size});
  params.head = weights.take("lm_head", "[V, d]", {params.vocab_size, params.hidden_size});
  std::vector<DecodeStepLayer> layers;
  layers.reserve(windows.size());
  for (const int64_t window : windows) layers.push_back(take_layer(weights, params, options, window));
  weights.finish();
  return layers;
}

// Those that count the new tokens.
std::vector<int32_t> checked_seqlens(const Tensor& seqlens, bool advance, const DecodeStepParams& params) {
  check_shape(kOp, "seqlens", seqlens, "[B]", {params.batch});
  check_dtype(kOp, "seqlens", seqlens, ScalarType::Int);
  if (advance && !seqlens.is_contiguous()) fail(kOp, "seqlens", "be contiguous with advance", "strides that are not");
  const Tensor dense = to_contiguous(seqlens);
  const int32_t* data = static_cast<const int32_t*>(dense.data_ptr());
  std::vector<int32_t> counts(data, data + params.batch);
  const int64_t added = advance ? params.num_tokens : 0;
  for (int32_t& count : counts) {
    count = static_cast<int32_t>(std::min<int64_t>(count + added, std::numeric_limits<int32_t>::max()));
  }
  return counts;
}

}  // namespace

std::tuple<Tensor, Tensor> decode_step(Tensor tokens, std::vector<Tensor> list, Tensor cos, Tensor sin, Tensor k_cache,
                                       Tensor v_cache, Tensor seqlens, std::optional<Tensor> beam_slots,
                                       std::vector<int64_t> windows, int64_t num_heads, double eps, bool qkv_bias,
                                       bool o_bias, bool qk_norm, bool advance, bool with_tile_sums) {
  DecodeStepParams params = checked_sizes(tokens, list, k_cache, num_heads);
  check_range(kOp, "eps", eps, eps >= 0 && eps < 1, "be in [0, 1)");
  params.eps = eps;
  const std::vector<DecodeStepLayer> layers = take_weights(list, windows, {qkv_bias, o_bias, qk_norm}, params);
  params.layers = layers.data();

  const Tensor& embedding = list[0];
  const int64_t rows = k_cache.size(1), capacity = k_cache.size(2);
  const auto cache_sizes = {params.num_layers, rows, capacity, params.num_kv_heads, params.head_dim};
  params.cos = check_table("cos", cos, kAny, params.head_dim / 2);
  params.sin = check_table("sin", sin, cos.size(0), params.head_dim / 2);
  params.k_cache = check_cache("k_cache", k_cache, cache_sizes, embedding);
  params.v_cache = check_cache("v_cache", v_cache, cache_sizes, embedding);
  const std::vector<int32_t> counts = checked_seqlens(seqlens, advance, params);
  tokens = to_contiguous(tokens);
  params.tokens = static_cast<const int64_t*>(tokens.data_ptr());
  params.seqlens = counts.data();
  if (beam_slots) {
    check_shape(kOp, "beam_slots", *beam_slots, "[B, S]", {params.batch, capacity});
    check_dtype(kOp, "beam_slots", *beam_slots, ScalarType::Int);
    beam_slots = with_dense_rows(*beam_slots);
    params.beam_slots = static_cast<const int32_t*>(beam_slots->data_ptr());
    params.slots_stride = beam_slots->stride(0);
  } else if (params.batch > rows) {
    fail(kOp, "tokens", "be at most the rows of the caches", std::to_string(params.batch));
  }
  check_tokens(params);
  check_places(params, rows, std::min(capacity, cos.size(0)));
  Tensor logits = tokens.dim() == 2 ? new_empty(embedding, {params.batch, params.num_tokens, params.vocab_size},
                                                embedding.scalar_type())
                                    : new_empty(embedding, {params.batch, params.vocab_size}, embedding.scalar_type());
  params.logits = logits.data_ptr();
  const int64_t num_tiles = num_logits_tiles(params.vocab_size);
  Tensor tile_sums = !with_tile_sums ? new_empty(embedding, {0}, ScalarType::Float)
                     : tokens.dim() == 2
                         ? new_empty(embedding, {2, num_tiles, params.batch, params.num_tokens}, ScalarType::Float)
                         : new_empty(embedding, {2, num_tiles, params.batch}, ScalarType::Float);
  params.tile_sums = with_tile_sums ? static_cast<float*>(tile_sums.data_ptr()) : nullptr;
  if (logits.numel() > 0) decode_step_cpu(params);
  if (advance) std::copy(counts.begin(), counts.end(), static_cast<int32_t*>(seqlens.data_ptr()));
  return {logits, tile_sums};
}

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "decode_step(Tensor tokens, Tensor[] weights, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!) seqlens, Tensor? beam_slots, int[] windows, int num_heads, float eps, bool qkv_bias, bool o_bias, "
      "bool qk_norm, bool advance=False, bool with_tile_sums=False) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace arfast
