// The choice between torch's matrix product on the CPU and ours: see matmul.h.
#include "binding/matmul.h"

#include <array>

#include "binding/tensor.h"

namespace arfast {
namespace {

// Views of raw memory carry no autograd state: the caller's thread may be one that autograd knows nothing of.
Tensor as_tensor(ScalarType dtype, const Matrix& m) {
  return torch::stable::from_blob(m.data, {m.rows, m.columns}, {m.row_stride, m.column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

// oneDNN's, which uses the machine's bfloat16 instructions.
void torch_matmul(const Matrix& a, const Matrix& b, const Matrix& out) {
  const Tensor out_tensor = as_tensor(ScalarType::BFloat16, out);
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(as_tensor(ScalarType::BFloat16, a)), from(as_tensor(ScalarType::BFloat16, b)),
                                    from(out_tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that the call returns
}

Matrix matrix_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

// torch multiplies float16 element by element where the machine has no float16 arithmetic.
void float16_matmul(const Matrix& a, const Matrix& b, const Matrix& out) {
  const Tensor wide_a = torch::stable::to(as_tensor(ScalarType::Half, a), ScalarType::Float);
  const Tensor wide_b = torch::stable::to(as_tensor(ScalarType::Half, b), ScalarType::Float);
  const Tensor wide_out = torch::stable::new_empty(wide_a, {out.rows, out.columns}, ScalarType::Float);
  matmul_cpu({DType::kFloat32, matrix_of(wide_a), matrix_of(wide_b), matrix_of(wide_out)});
  Tensor out_tensor = as_tensor(ScalarType::Half, out);
  torch::stable::copy_(out_tensor, wide_out);
}

}  // namespace

// GFLOP/s of one thread of a Zen 5 on [256, 512] x [512, 1024], torch 2.13, November 2026: float32 torch (MKL, which
// keeps to AVX2 there) 112, ours 242; bfloat16 torch 490; float16 torch 2 to 24.
void fastest_matmul(DType dtype, const Matrix& a, const Matrix& b, const Matrix& out) {
  if (out.rows == 0 || out.columns == 0) return;
  switch (dtype) {
    case DType::kBFloat16:
      return torch_matmul(a, b, out);
    case DType::kFloat16:
      return float16_matmul(a, b, out);
    default:
      return matmul_cpu({dtype, a, b, out});
  }
}

}  // namespace arfast
