// Binding of kv_append: schema, checks, allocation and the choice of the implementation.
#include "kv_append/kv_append.h"

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "kv_append";

using OptionalTensor = std::optional<Tensor>;

Tensor check_table(const char* argument, const Tensor& table, int64_t rows, const Tensor& q) {
  check_shape(kOp, argument, table, "[P, D / 2]", {rows, q.size(3) / 2});
  check_dtype(kOp, argument, table, ScalarType::Float);
  check_same_device(kOp, argument, table, "q", q);
  return to_contiguous(table);
}

void check_like_q(const char* argument, const Tensor& tensor, const Tensor& q) {
  check_same_dtype(kOp, argument, tensor, "q", q);
  check_same_device(kOp, argument, tensor, "q", q);
}

void check_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                   const OptionalTensor& block_table, const OptionalTensor& beam_slots) {
  check_shape(kOp, "q", q, "[B, T, H, D]", {kAny, kAny, kAny, kAny});
  check_shape(kOp, "k", k, "[B, T, Hkv, D]", {q.size(0), q.size(1), kAny, q.size(3)});
  check_shape(kOp, "v", v, "[B, T, Hkv, D]", {q.size(0), q.size(1), k.size(2), q.size(3)});
  check(q.size(3) % 2 == 0, kOp, "q", "have an even head_dim", std::to_string(q.size(3)));
  check(!block_table || !beam_slots, kOp, "beam_slots", "be None with block_table", "a tensor");
  const bool own_rows = !block_table && !beam_slots;
  const char* names = block_table ? "[pages, page, Hkv, D]" : "[B, S_max, Hkv, D]";
  check_shape(kOp, "k_cache", k_cache, names, {own_rows ? q.size(0) : kAny, kAny, k.size(2), q.size(3)});
  check_shape(kOp, "v_cache", v_cache, names, {k_cache.size(0), k_cache.size(1), k.size(2), q.size(3)});
  check(!block_table || k_cache.size(1) >= 1, kOp, "k_cache", "have at least one token per page", "0");
  float_dtype(kOp, "q", q);
  check_like_q("k", k, q);
  check_like_q("v", v, q);
  for (const auto& [name, cache] : {std::pair{"k_cache", &k_cache}, std::pair{"v_cache", &v_cache}}) {
    check_like_q(name, *cache, q);
    check(cache->size(3) <= 1 || cache->stride(3) == 1, kOp, name, "have dense heads",
          "a stride of " + std::to_string(cache->stride(3)));
  }
}

// On the CPU the integers that are read are checked.
void check_values(const KVAppendParams& params) {
  const std::string range = "[" + std::to_string(params.num_tokens) + ", " + std::to_string(params.capacity) + "]";
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t seqlen = params.seqlens[b];
    check(seqlen >= params.num_tokens && seqlen <= params.capacity, kOp, "seqlens",
          ("be in " + range + ", from the new tokens to what the cache holds").c_str(),
          std::to_string(seqlen) + " at position " + std::to_string(b));
    for (int64_t position = seqlen - params.num_tokens; position < seqlen; ++position) {
      const int64_t table_row = b * params.table_stride, page = position / params.page_size;
      if (params.block_table != nullptr) {
        check_entry(kOp, "block_table", params.block_table[table_row + page], params.cache_batch, b, page);
      } else if (params.beam_slots != nullptr) {
        check_entry(kOp, "beam_slots", params.beam_slots[table_row + position], params.cache_batch, b, position);
      }
    }
  }
}

// -> q, rotated [B, T, H, D]
Tensor kv_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache, Tensor seqlens,
                 OptionalTensor block_table, OptionalTensor beam_slots) {
  check_tensors(q, k, v, k_cache, v_cache, block_table, beam_slots);
  const int64_t batch = q.size(0), num_tokens = q.size(1);
  cos = check_table("cos", cos, kAny, q);
  sin = check_table("sin", sin, cos.size(0), q);
  const int64_t rows = batch * num_tokens, table_rows = cos.size(0);
  if (rows > 0 && (table_rows == 0 || rows % table_rows != 0)) {
    fail(kOp, "cos", "have rows that divide the " + std::to_string(rows) + " rows of q", std::to_string(table_rows));
  }
  seqlens = checked_integers(kOp, "seqlens", seqlens, "[B]", {batch}, "q", q);
  if (block_table) {
    block_table = checked_integers(kOp, "block_table", *block_table, "[B, pages]", {batch, kAny}, "q", q);
  }
  if (beam_slots) {
    beam_slots = checked_integers(kOp, "beam_slots", *beam_slots, "[B, S_max]", {batch, k_cache.size(1)}, "q", q);
  }
  q = with_dense_rows(q);
  k = with_dense_rows(k);
  v = with_dense_rows(v);
  Tensor out = new_empty(q, {batch, num_tokens, q.size(2), q.size(3)}, q.scalar_type());
  const KVAppendParams params{
      .dtype = float_dtype(kOp, "q", q),
      .batch = batch,
      .num_tokens = num_tokens,
      .num_heads = q.size(2),
      .num_kv_heads = k.size(2),
      .head_dim = q.size(3),
      .table_rows = table_rows,
      .q = view_of(q),
      .k = view_of(k),
      .v = view_of(v),
      .cos = static_cast<const float*>(cos.data_ptr()),
      .sin = static_cast<const float*>(sin.data_ptr()),
      .k_cache = view_of(k_cache),
      .v_cache = view_of(v_cache),
      .seqlens = static_cast<const int32_t*>(seqlens.data_ptr()),
      .block_table = static_cast<const int32_t*>(pointer_or_null(block_table)),
      .beam_slots = static_cast<const int32_t*>(pointer_or_null(beam_slots)),
      .table_stride = block_table ? block_table->size(1) : k_cache.size(1),
      .page_size = k_cache.size(1),
      .capacity = block_table ? block_table->size(1) * k_cache.size(1) : k_cache.size(1),
      .cache_batch = k_cache.size(0),
      .out = out.data_ptr(),
  };
  if (on_cpu(q)) check_values(params);
  if (out.numel() == 0 && k.numel() == 0) return out;
  run(kOp, q, params, kv_append_cpu, kv_append_cuda);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "kv_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor seqlens, Tensor? block_table, Tensor? beam_slots) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("kv_append", TORCH_BOX(&kv_append)); }
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) { m.impl("kv_append", TORCH_BOX(&kv_append)); }

}  // namespace arfast
