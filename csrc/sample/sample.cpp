// Binding of sample: schema, checks, allocation and the choice of the implementation.
#include "sample/sample.h"

#include <tuple>

#include "binding/tensor.h"
#include "binding/token_filters.h"

namespace arfast {
namespace {

constexpr const char* kOp = "sample";

// -> (tokens int64 [R], logprobs [R])
std::tuple<Tensor, Tensor> sample(Tensor logits, double temperature, int64_t top_k, double top_p, double min_p,
                                  Tensor generator_state) {
  check_shape(kOp, "logits", logits, "[R, V]", {kAny, kAny});
  const DType dtype = float_dtype(kOp, "logits", logits);
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  check_vocab_size(kOp, "logits", logits);
  const TokenFilters filters = token_filters(kOp, temperature, top_k, top_p, min_p);
  check_generator_state(kOp, generator_state, "[R, 3]", "logits", logits);
  logits = with_dense_rows(logits);

  Tensor tokens = new_empty(logits, {rows}, ScalarType::Long);
  Tensor logprobs = new_empty(logits, {rows}, ScalarType::Float);
  SampleParams params{
      .dtype = dtype,
      .num_rows = rows,
      .vocab_size = vocab_size,
      .logits = logits.data_ptr(),
      .logits_stride = logits.stride(0),
      .filters = filters,
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
