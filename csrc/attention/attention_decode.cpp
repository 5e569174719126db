// Binding of attention_decode: schema, checks, allocation and the choice of the implementation.
#include "attention/attention_decode.h"

#include <algorithm>
#include <cmath>

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "attention_decode";

using OptionalTensor = std::optional<Tensor>;

void check_tensors(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& block_table,
                   const OptionalTensor& beam_slots, const OptionalTensor& sink) {
  check_shape(kOp, "q", q, "[B, Tq, H, D]", {kAny, kAny, kAny, kAny});
  check(!block_table || !beam_slots, kOp, "beam_slots", "be None with block_table", "a tensor");
  const bool own_rows = !block_table && !beam_slots;
  const char* names = block_table ? "[pages, page, Hkv, D]" : "[B, S_max, Hkv, D]";
  check_shape(kOp, "k_cache", k_cache, names, {own_rows ? q.size(0) : kAny, kAny, kAny, q.size(3)});
  check_shape(kOp, "v_cache", v_cache, names, {k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3)});
  const int64_t num_heads = q.size(2), num_kv_heads = k_cache.size(2), head_dim = q.size(3);
  check(num_heads >= 1, kOp, "q", "have at least one head", "0");
  check(head_dim >= 1 && head_dim <= kAttentionMaxHeadDim, kOp, "q", "have a head_dim in [1, 256]",
        std::to_string(head_dim));
  check(num_kv_heads >= 1 && num_heads % num_kv_heads == 0, kOp, "k_cache",
        ("have a number of heads that divides q's " + std::to_string(num_heads)).c_str(), std::to_string(num_kv_heads));
  float_dtype(kOp, "q", q);
  check_same_dtype(kOp, "k_cache", k_cache, "q", q);
  check_same_dtype(kOp, "v_cache", v_cache, "q", q);
  check_same_device(kOp, "k_cache", k_cache, "q", q);
  check_same_device(kOp, "v_cache", v_cache, "q", q);
  check(!block_table || k_cache.size(1) >= 1, kOp, "k_cache", "have at least one key per page", "0");
  if (sink) {
    check_shape(kOp, "sink", *sink, "[H]", {num_heads});
    check_dtype(kOp, "sink", *sink, statistics_dtype(q));
    check_same_device(kOp, "sink", *sink, "q", q);
  }
}

// On the CPU the integers that are read are checked, and the workspace is as large as this call needs.
void check_values(AttentionDecodeParams& params) {
  const int64_t capacity = params.capacity, cache_batch = params.cache_batch;
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t seqlen = params.seqlens[b];
    check(seqlen >= 0 && seqlen <= capacity, kOp, "seqlens",
          ("be in [0, " + std::to_string(capacity) + "], the keys that the cache holds").c_str(),
          std::to_string(seqlen) + " at position " + std::to_string(b));
    const DecodeSplits splits(seqlen, params.num_queries, params.window, params.num_splits);
    params.max_splits = std::max(params.max_splits, splits.count);
    if (params.block_table != nullptr) {
      for (int64_t page = splits.first / params.page_size; page * params.page_size < seqlen; ++page) {
        check_entry(kOp, "block_table", params.block_table[b * params.table_stride + page], cache_batch, b, page);
      }
    }
    for (int64_t key = splits.first; params.beam_slots != nullptr && key < seqlen; ++key) {
      check_entry(kOp, "beam_slots", params.beam_slots[b * params.table_stride + key], cache_batch, b, key);
    }
  }
}

// -> out [B, Tq, H, D]
Tensor attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqlens, OptionalTensor block_table,
                        std::optional<double> softmax_scale, std::optional<int64_t> window,
                        std::optional<double> softcap, OptionalTensor sink, OptionalTensor beam_slots,
                        int64_t num_splits, int64_t kernel) {
  check_tensors(q, k_cache, v_cache, block_table, beam_slots, sink);
  seqlens = checked_integers(kOp, "seqlens", seqlens, "[B]", {q.size(0)}, "q", q);
  if (block_table) {
    block_table = checked_integers(kOp, "block_table", *block_table, "[B, pages]", {q.size(0), kAny}, "q", q);
  }
  if (beam_slots) {
    beam_slots = checked_integers(kOp, "beam_slots", *beam_slots, "[B, S_max]", {q.size(0), k_cache.size(1)}, "q", q);
  }
  const double scale = softmax_scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  check_range(kOp, "softmax_scale", scale, scale > 0 && std::isfinite(scale), "be finite and positive");
  const double cap = softcap.value_or(1);
  check_range(kOp, "softcap", cap, cap > 0 && std::isfinite(cap), "be finite and positive");
  check(window.value_or(0) >= 0, kOp, "window", "be at least 0", std::to_string(window.value_or(0)));
  check(num_splits >= 0, kOp, "num_splits", "be at least 0", std::to_string(num_splits));
  check(kernel >= 0 && kernel <= static_cast<int64_t>(DecodeKernel::kTensorCores), kOp, "kernel", "be in [0, 2]",
        std::to_string(kernel));
  q = with_dense_rows(q);
  k_cache = with_dense_rows(k_cache);
  v_cache = with_dense_rows(v_cache);
  if (sink) sink = to_contiguous(*sink);

  Tensor out = new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  AttentionDecodeParams params{
      .dtype = float_dtype(kOp, "q", q),
      .batch = q.size(0),
      .num_queries = q.size(1),
      .num_heads = q.size(2),
      .num_kv_heads = k_cache.size(2),
      .head_dim = q.size(3),
      .softmax_scale = scale,
      .softcap = softcap.value_or(0),
      .window = window.value_or(-1),
      .q = view_of(q),
      .k = view_of(k_cache),
      .v = view_of(v_cache),
      .sink = pointer_or_null(sink),
      .seqlens = static_cast<const int32_t*>(seqlens.data_ptr()),
      .block_table = static_cast<const int32_t*>(pointer_or_null(block_table)),
      .beam_slots = static_cast<const int32_t*>(pointer_or_null(beam_slots)),
      .table_stride = block_table ? block_table->size(1) : k_cache.size(1),
      .page_size = k_cache.size(1),
      .capacity = block_table ? block_table->size(1) * k_cache.size(1) : k_cache.size(1),
      .cache_batch = k_cache.size(0),
      .num_splits = num_splits,
      .max_splits = 1,
      .kernel = static_cast<DecodeKernel>(kernel),
      .partial = nullptr,
      .out = out.data_ptr(),
  };
  if (on_cpu(q)) {
    check_values(params);
  } else {  // whose lengths only it knows
    params.max_splits = most_decode_splits(params.capacity, params.num_queries, params.window, num_splits);
  }
  if (out.numel() == 0) return out;
  const int64_t rows = q.size(0) * q.size(1) * q.size(2) * params.max_splits;
  Tensor partial = new_empty(q, {rows, q.size(3) + 2}, statistics_dtype(q));
  params.partial = partial.data_ptr();
  run(kOp, q, params, attention_decode_cpu, attention_decode_cuda);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqlens, Tensor? block_table, "
      "float? softmax_scale, int? window, float? softcap, Tensor? sink, Tensor? beam_slots, int num_splits, int "
      "kernel) "
      "-> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("attention_decode", TORCH_BOX(&attention_decode)); }
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) { m.impl("attention_decode", TORCH_BOX(&attention_decode)); }

}  // namespace arfast
