// Binding of attention: schema, checks, allocation and the choice of the implementation.
#include "attention/attention.h"

#include <cmath>
#include <tuple>

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "attention";

using OptionalTensor = std::optional<Tensor>;

// Makes int32 [B + 1] dense. On the CPU the values are checked, too: 0 = c[0] <= c[1] <= ... <= rows. Returns the
// longest document (on a GPU 0: looking would stall the stream).
int64_t check_cu_seqlens(const char* argument, Tensor& cu_seqlens, const Tensor& q, int64_t rows) {
  cu_seqlens = checked_integers(kOp, argument, cu_seqlens, "[B + 1]", {kAny}, "q", q);
  check(cu_seqlens.size(0) >= 1, kOp, argument, "have shape [B + 1]", "[0]");
  if (!q.is_cpu()) return 0;
  const int32_t* values = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  check(values[0] == 0, kOp, argument, "start at 0", std::to_string(values[0]));
  int64_t longest = 0;
  for (int64_t i = 1; i < cu_seqlens.size(0); ++i) {
    const std::string got = std::to_string(values[i]) + " at position " + std::to_string(i);
    check(values[i] >= values[i - 1], kOp, argument, "not decrease", got);
    check(values[i] <= rows, kOp, argument, ("be at most the number of rows, " + std::to_string(rows)).c_str(), got);
    longest = std::max<int64_t>(longest, values[i] - values[i - 1]);
  }
  return longest;
}

void check_max_seqlen(const char* argument, std::optional<int64_t> max_seqlen, int64_t longest) {
  if (!max_seqlen || *max_seqlen >= longest) return;
  fail(kOp, argument, "be at least the longest sequence, " + std::to_string(longest), std::to_string(*max_seqlen));
}

// The arguments that forward and backward pass share, checked, and kept alive for the pointers in `problem`.
struct Arguments {
  Tensor q, k, v;
  OptionalTensor sink, cu_seqlens_q, cu_seqlens_k;
  AttentionProblem problem;

  Arguments(Tensor q_, Tensor k_, Tensor v_, OptionalTensor sink_, OptionalTensor cu_seqlens_q_,
            OptionalTensor cu_seqlens_k_, std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
            std::optional<double> softmax_scale, bool causal, std::optional<int64_t> window,
            std::optional<double> softcap)
      : q(q_), k(k_), v(v_), sink(sink_), cu_seqlens_q(cu_seqlens_q_), cu_seqlens_k(cu_seqlens_k_), problem() {
    check_tensors();
    q = with_dense_rows(q);
    k = with_dense_rows(k);
    v = with_dense_rows(v);
    if (sink) sink = to_contiguous(*sink);
    problem.dtype = float_dtype(kOp, "q", q);
    problem.batch = packed() ? cu_seqlens_q->size(0) - 1 : q.size(0);
    problem.num_queries = q.size(-3);
    problem.num_keys = k.size(-3);
    problem.num_heads = q.size(-2);
    problem.num_kv_heads = k.size(-2);
    problem.head_dim = q.size(-1);
    int64_t longest_q = problem.num_queries, longest_k = problem.num_keys;
    if (packed()) {
      longest_q = check_cu_seqlens("cu_seqlens_q", *cu_seqlens_q, q, problem.num_queries);
      longest_k = check_cu_seqlens("cu_seqlens_k", *cu_seqlens_k, q, problem.num_keys);
      check_shape(kOp, "cu_seqlens_k", *cu_seqlens_k, "[B + 1]", {cu_seqlens_q->size(0)});
    }
    check_max_seqlen("max_seqlen_q", max_seqlen_q, longest_q);
    check_max_seqlen("max_seqlen_k", max_seqlen_k, longest_k);
    const double scale = softmax_scale.value_or(1 / std::sqrt(static_cast<double>(problem.head_dim)));
    check_range(kOp, "softmax_scale", scale, scale > 0 && std::isfinite(scale), "be finite and positive");
    const double cap = softcap.value_or(1);
    check_range(kOp, "softcap", cap, cap > 0 && std::isfinite(cap), "be finite and positive");
    check(window.value_or(0) >= 0, kOp, "window", "be at least 0", std::to_string(window.value_or(0)));
    problem.cu_seqlens_q = static_cast<const int32_t*>(pointer_or_null(cu_seqlens_q));
    problem.cu_seqlens_k = static_cast<const int32_t*>(pointer_or_null(cu_seqlens_k));
    problem.softmax_scale = scale;
    problem.softcap = softcap.value_or(0);
    problem.causal = causal;
    problem.window = window.value_or(-1);
    problem.q = view_of(q);
    problem.k = view_of(k);
    problem.v = view_of(v);
    problem.sink = pointer_or_null(sink);
  }

  bool packed() const { return cu_seqlens_q.has_value(); }

  void check_like_q(const char* argument, const Tensor& tensor) const {
    if (packed()) {
      check_shape(kOp, argument, tensor, "[N, H, D]", {q.size(0), q.size(1), q.size(2)});
    } else {
      check_shape(kOp, argument, tensor, "[B, T, H, D]", {q.size(0), q.size(1), q.size(2), q.size(3)});
    }
    check_same_dtype(kOp, argument, tensor, "q", q);
    check_same_device(kOp, argument, tensor, "q", q);
  }

  void check_statistics(const char* argument, const Tensor& tensor) const {
    if (packed()) {
      check_shape(kOp, argument, tensor, "[H, N]", {q.size(1), q.size(0)});
    } else {
      check_shape(kOp, argument, tensor, "[B, H, T]", {q.size(0), q.size(2), q.size(1)});
    }
    check_dtype(kOp, argument, tensor, statistics_dtype(q));
    check_same_device(kOp, argument, tensor, "q", q);
  }

  Tensor new_statistics() const {
    if (packed()) return new_empty(q, {q.size(1), q.size(0)}, statistics_dtype(q));
    return new_empty(q, {q.size(0), q.size(2), q.size(1)}, statistics_dtype(q));
  }

 private:
  void check_tensors() const {
    check(cu_seqlens_k.has_value() == packed(), kOp, "cu_seqlens_k", "be given exactly when cu_seqlens_q is",
          cu_seqlens_k ? "a tensor" : "None");
    if (packed()) {
      check_shape(kOp, "q", q, "[N, H, D]", {kAny, kAny, kAny});
      check_shape(kOp, "k", k, "[N, Hkv, D]", {kAny, kAny, q.size(2)});
      check_shape(kOp, "v", v, "[N, Hkv, D]", {k.size(0), k.size(1), q.size(2)});
    } else {
      check_shape(kOp, "q", q, "[B, T, H, D]", {kAny, kAny, kAny, kAny});
      check_shape(kOp, "k", k, "[B, S, Hkv, D]", {q.size(0), kAny, kAny, q.size(3)});
      check_shape(kOp, "v", v, "[B, S, Hkv, D]", {q.size(0), k.size(1), k.size(2), q.size(3)});
    }
    const int64_t num_heads = q.size(-2), num_kv_heads = k.size(-2), head_dim = q.size(-1);
    check(num_heads >= 1, kOp, "q", "have at least one head", "0");
    check(head_dim >= 1 && head_dim <= kAttentionMaxHeadDim, kOp, "q", "have a head_dim in [1, 256]",
          std::to_string(head_dim));
    check(num_kv_heads >= 1 && num_heads % num_kv_heads == 0, kOp, "k",
          ("have a number of heads that divides q's " + std::to_string(num_heads)).c_str(),
          std::to_string(num_kv_heads));
    float_dtype(kOp, "q", q);
    check_same_dtype(kOp, "k", k, "q", q);
    check_same_dtype(kOp, "v", v, "q", q);
    check_same_device(kOp, "k", k, "q", q);
    check_same_device(kOp, "v", v, "q", q);
    if (sink) {
      check_shape(kOp, "sink", *sink, "[H]", {num_heads});
      check_dtype(kOp, "sink", *sink, statistics_dtype(q));
      check_same_device(kOp, "sink", *sink, "q", q);
    }
  }
};

// A dense tensor of the shape of `like`.
Tensor new_like(const Tensor& like) {
  if (like.dim() == 3) return new_empty(like, {like.size(0), like.size(1), like.size(2)}, like.scalar_type());
  return new_empty(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type());
}

// -> (out like q, lse [B, H, T] or [H, N])
std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, OptionalTensor sink,
                                             OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                             std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
                                             std::optional<double> softmax_scale, bool causal,
                                             std::optional<int64_t> window, std::optional<double> softcap) {
  const Arguments arguments(q, k, v, sink, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                            causal, window, softcap);
  Tensor out = new_like(arguments.q);
  Tensor lse = arguments.new_statistics();
  if (out.numel() == 0) return {out, lse};
  const AttentionForwardParams params{.problem = arguments.problem, .out = out.data_ptr(), .lse = lse.data_ptr()};
  run(kOp, arguments.q, params, attention_forward_cpu, attention_forward_cuda);
  return {out, lse};
}

// -> (dq, dk, dv like q, k, v; dsink [H], [0] without a sink)
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor sink,
    OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k, std::optional<double> softmax_scale, bool causal,
    std::optional<int64_t> window, std::optional<double> softcap, bool deterministic) {
  const Arguments arguments(q, k, v, sink, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                            causal, window, softcap);
  arguments.check_like_q("dout", dout);
  arguments.check_like_q("out", out);
  arguments.check_statistics("lse", lse);
  if (dlse) arguments.check_statistics("dlse", *dlse);
  dout = with_dense_rows(dout);
  out = with_dense_rows(out);
  lse = to_contiguous(lse);
  if (dlse) dlse = to_contiguous(*dlse);

  const AttentionProblem& problem = arguments.problem;
  const ScalarType wide = statistics_dtype(arguments.q);
  const bool cpu = on_cpu(arguments.q);
  const int64_t splits = cpu ? attention_key_splits(problem.batch, problem.num_kv_heads, problem.num_keys) : 1;
  Tensor dq = new_like(arguments.q), dk = new_like(arguments.k), dv = new_like(arguments.v);
  Tensor dsink = new_empty(q, {sink ? problem.num_heads : 0}, wide);
  Tensor dq_partial = new_empty(q, {splits > 1 ? splits * q.numel() : 0}, wide);
  const int64_t rows = cpu ? 0 : lse.numel(), size = attention_padded_head_dim(problem.head_dim);
  Tensor row_terms = new_empty(q, {rows, 2}, wide), dq_sums = new_zeros(q, {rows, size}, wide);
  Tensor dp_sums = new_zeros(q, {sink ? rows : 0}, wide);
  Tensor turns = new_zeros(q, {deterministic && !cpu ? 1 + attention_turns(problem) : 0}, ScalarType::Int);
  const AttentionBackwardParams params{
      .problem = problem,
      .out = view_of(out),
      .dout = view_of(dout),
      .lse = lse.data_ptr(),
      .dlse = pointer_or_null(dlse),
      .key_splits = splits,
      .dq_partial = splits > 1 ? dq_partial.data_ptr() : nullptr,
      .on_gpu = {.row_terms = static_cast<float*>(row_terms.data_ptr()),
                 .dq_sums = static_cast<float*>(dq_sums.data_ptr()),
                 .dp_sums = sink ? static_cast<float*>(dp_sums.data_ptr()) : nullptr,
                 .turns = deterministic ? static_cast<uint32_t*>(turns.data_ptr()) : nullptr},
      .dq = dq.data_ptr(),
      .dk = dk.data_ptr(),
      .dv = dv.data_ptr(),
      .dsink = sink ? dsink.data_ptr() : nullptr,
  };
  run(kOp, arguments.q, params, attention_backward_cpu, attention_backward_cuda);
  return {dq, dk, dv, dsink};
}

}  // namespace

#define ARFAST_ATTENTION_ARGUMENTS                                                                   \
  "Tensor? sink, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int? max_seqlen_q, int? max_seqlen_k, " \
  "float? softmax_scale, bool causal, int? window, float? softcap"

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, " ARFAST_ATTENTION_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "  //
        ARFAST_ATTENTION_ARGUMENTS ", bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace arfast
