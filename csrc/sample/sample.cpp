// Binding of sample: schema, checks, allocation and the choice of the implementation.
#include "sample/sample.h"

#include <cmath>
#include <tuple>

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "sample";

void check_filters(double temperature, int64_t top_k, double top_p, double min_p) {
  check_range(kOp, "temperature", temperature, temperature >= 0 && std::isfinite(static_cast<float>(temperature)),
              "be at least 0 and a finite float32");
  if (top_k < 0) fail(kOp, "top_k", "be at least 0", std::to_string(top_k));
  check_range(kOp, "top_p", top_p, top_p >= 0 && top_p <= 1, "be in [0, 1]");
  check_range(kOp, "min_p", min_p, min_p >= 0 && min_p <= 1, "be in [0, 1]");
}

void check_state(const Tensor& state, const Tensor& logits) {
  check_shape(kOp, "generator_state", state, "[R, 3]", {logits.size(0), 3});
  check_dtype(kOp, "generator_state", state, ScalarType::Long);
  check_same_device(kOp, "generator_state", state, "logits", logits);
  if (state.size(0) > 1 && (state.stride(0) == 0 || state.stride(1) == 0)) {
    fail(kOp, "generator_state", "have memory for every element", "a stride of 0");
  }
}

// -> (tokens int64 [R], logprobs [R])
std::tuple<Tensor, Tensor> sample(Tensor logits, double temperature, int64_t top_k, double top_p, double min_p,
                                  Tensor generator_state) {
  check_shape(kOp, "logits", logits, "[R, V]", {kAny, kAny});
  const DType dtype = float_dtype(kOp, "logits", logits);
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  if (vocab_size < 1 || vocab_size >= int64_t{1} << 24) fail(kOp, "logits", "have 1 <= V < 2^24", shape_of(logits));
  check_filters(temperature, top_k, top_p, min_p);
  check_state(generator_state, logits);
  logits = with_dense_rows(logits);

  Tensor tokens = new_empty(logits, {rows}, ScalarType::Long);
  Tensor logprobs = new_empty(logits, {rows}, ScalarType::Float);
  const bool greedy = static_cast<float>(temperature) == 0;
  SampleParams params{
      .dtype = dtype,
      .num_rows = rows,
      .vocab_size = vocab_size,
      .logits = logits.data_ptr(),
      .logits_stride = logits.stride(0),
      .temperature = greedy ? 1.0f : static_cast<float>(temperature),
      .top_k = greedy ? 1 : top_k,
      .top_p = greedy ? 0 : top_p,
      .min_weight = static_cast<uint64_t>(std::ceil(min_p * 0x1p40)),
      .generator_state = static_cast<int64_t*>(generator_state.data_ptr()),
      .state_stride = generator_state.stride(0),
      .state_column_stride = generator_state.stride(1),
      .tokens = static_cast<int64_t*>(tokens.data_ptr()),
      .logprobs = static_cast<float*>(logprobs.data_ptr()),
      .workspace = nullptr,
      .num_arrived = nullptr,
  };
  Tensor workspace, num_arrived;
  if (!on_cpu(logits)) {
    workspace = new_empty(logits, {sample_workspace_bytes(params)}, ScalarType::Byte);
    num_arrived = new_zeros(logits, {rows}, ScalarType::Int);
    params.workspace = workspace.data_ptr();
    params.num_arrived = static_cast<uint32_t*>(num_arrived.data_ptr());
  }
  run(kOp, logits, params, sample_cpu, sample_cuda);
  return {tokens, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def(
      "sample(Tensor logits, float temperature, int top_k, float top_p, float min_p, Tensor(a!) generator_state) -> "
      "(Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace arfast
