// Bindings of sample and sample_step: schemas, checks, allocation and the choice of the implementation.
#include "sample/sample.h"

#include <tuple>

#include "binding/decoding.h"
#include "binding/token_filters.h"

namespace arfast {
namespace {

// The checked arguments of a draw.
struct Draw {
  const char* op;
  Tensor logits, generator_state;
  TokenFilters filters;

  Draw(const char* op, const Tensor& from, double temperature, int64_t top_k, double top_p, double min_p,
       const Tensor& generator_state)
      : op(op), generator_state(generator_state) {
    check_shape(op, "logits", from, "[R, V]", {kAny, kAny});
    float_dtype(op, "logits", from);
    check_vocab_size(op, "logits", from);
    filters = token_filters(op, temperature, top_k, top_p, min_p);
    check_generator_state(op, generator_state, "[R, 3]", "logits", from);
    logits = with_dense_rows(from);
  }

  SampleParams params(int64_t* tokens, float* logprobs) const {
    return {
        .dtype = float_dtype(op, "logits", logits),
        .num_rows = logits.size(0),
        .vocab_size = logits.size(1),
        .logits = logits.data_ptr(),
        .logits_stride = logits.stride(0),
        .filters = filters,
        .generator_state = static_cast<int64_t*>(generator_state.data_ptr()),
        .state_stride = generator_state.stride(0),
        .state_column_stride = generator_state.stride(1),
        .tokens = tokens,
        .logprobs = logprobs,
        .workspace = nullptr,
        .num_arrived = nullptr,
    };
  }

  template <typename Params>
  void run(Params params, void (*cpu)(const Params&), const char* (*cuda)(const Params&, void*)) const {
    Tensor workspace, num_arrived;
    if (!on_cpu(logits)) {
      workspace = new_empty(logits, {sample_workspace_bytes(params)}, ScalarType::Byte);
      num_arrived = new_zeros(logits, {params.num_rows}, ScalarType::Int);
      params.workspace = workspace.data_ptr();
      params.num_arrived = static_cast<uint32_t*>(num_arrived.data_ptr());
    }
    arfast::run(op, logits, params, cpu, cuda);
  }
};

// -> (tokens int64 [R], logprobs [R])
std::tuple<Tensor, Tensor> sample(Tensor logits, double temperature, int64_t top_k, double top_p, double min_p,
                                  Tensor generator_state) {
  const Draw draw("sample", logits, temperature, top_k, top_p, min_p, generator_state);
  Tensor tokens = new_empty(logits, {logits.size(0)}, ScalarType::Long);
  Tensor logprobs = new_empty(logits, {logits.size(0)}, ScalarType::Float);
  const SampleParams params =
      draw.params(static_cast<int64_t*>(tokens.data_ptr()), static_cast<float*>(logprobs.data_ptr()));
  draw.run(params, sample_cpu, sample_cuda);
  return {tokens, logprobs};
}

}  // namespace

void sample_step(Tensor logits, double temperature, int64_t top_k, double top_p, double min_p, Tensor generator_state,
                 Tensor ends, int64_t pad_token, Tensor lengths, Tensor tokens, Tensor log_probs, Tensor status,
                 Tensor next_tokens, std::optional<Tensor> tile_sums) {
  constexpr const char* kOp = "sample_step";
  const Draw draw(kOp, logits, temperature, top_k, top_p, min_p, generator_state);
  const int64_t rows = logits.size(0);
  check_shape(kOp, "ends", ends, "[number of end tokens]", {kAny});
  check_shape(kOp, "tokens", tokens, "[R, L]", {rows, kAny});
  check_dtype(kOp, "tokens", tokens, ScalarType::Long);
  check_same_device(kOp, "tokens", tokens, "logits", logits);
  const int64_t length = tokens.size(1);
  if (length < 1) fail(kOp, "tokens", "have room for a step", shape_of(tokens));
  if ((length > 1 && tokens.stride(1) != 1) || (rows > 1 && tokens.stride(0) < length)) {
    fail(kOp, "tokens", "have dense rows in memory of their own", "strides that are not");
  }
  SampleStepParams params{draw.params(nullptr, nullptr), {}, nullptr};
  params.state = {
      .max_length = length,
      .num_ends = ends.size(0),
      .ends = state_data<int64_t>(kOp, "ends", ends, "[number of end tokens]", {ends.size(0)}, logits),
      .pad_token = pad_token,
      .lengths = state_data<int32_t>(kOp, "lengths", lengths, "[R]", {rows}, logits),
      .tokens = static_cast<int64_t*>(tokens.data_ptr()),
      .tokens_stride = tokens.stride(0),
      .log_probs = state_data<float>(kOp, "log_probs", log_probs, "[R, L]", {rows, length}, logits),
      .status = state_data<int32_t>(kOp, "status", status, "[R]", {rows}, logits),
      .next_tokens = state_data<int64_t>(kOp, "next_tokens", next_tokens, "[R]", {rows}, logits),
  };
  if (tile_sums) {
    if (!on_cpu(logits)) fail(kOp, "tile_sums", "be None but on the CPU", "a tensor");
    const int64_t tiles = num_logits_tiles(logits.size(1));
    params.tile_sums = state_data<float>(kOp, "tile_sums", *tile_sums, "[2, tiles, R]", {2, tiles, rows}, logits);
  }
  draw.run(params, sample_step_cpu, sample_step_cuda);
}

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "sample(Tensor logits, float temperature, int top_k, float top_p, float min_p, Tensor(a!) generator_state) -> "
      "(Tensor, Tensor)");
  m.def(
      "sample_step(Tensor logits, float temperature, int top_k, float top_p, float min_p, Tensor(a!) generator_state, "
      "Tensor ends, int pad_token, Tensor(b!) lengths, Tensor(c!) tokens, Tensor(d!) log_probs, Tensor(e!) status, "
      "Tensor(f!) next_tokens, Tensor? tile_sums=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sample_step", TORCH_BOX(&sample_step));
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sample_step", TORCH_BOX(&sample_step));
}

}  // namespace arfast
