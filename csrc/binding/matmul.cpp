// The choice between torch's matrix products on the CPU and ours.
#include "binding/matmul.h"

#include <algorithm>
#include <array>

#include "binding/tensor.h"
#include "core/amx.h"
#include "core/bf16_matmul.h"
#include "core/tasks.h"

namespace arfast {
namespace {

// GFLOP/s of one thread of a Zen 5 (peak: float32 289, bfloat16 577) on [1024, 512] x [512, 32000], November 2026,
// torch 2.13: float32 torch (MKL, which keeps to AVX2 there) 112, ours 242; bfloat16 torch (oneDNN) 512, ours 520, and
// on the transposed products of a backward pass 466 and 493 against 505 and 516; float16 torch 2 to 24. oneDNN uses
// matrix units, our product does not.
Matmul own_matmul(DType dtype) {
  static const bool bf16 = has_bf16_products() && !has_amx();
  if (dtype == DType::kFloat32 || dtype == DType::kFloat64) return matmul_cpu;
  return dtype == DType::kBFloat16 && bf16 ? bf16_matmul : nullptr;
}

// Rows, columns and depth from which packing both operands anew pays. GFLOP/s of one thread of an Intel Xeon with AMX,
// November 2026, torch 2.13, 16 products one after the other, none in the cache: torch (MKL), ours, ours by the matrix
// units [264, 512] x [1024, 512]^T 140, 137, 178; [264, 1024] x [1024, 512] 145, 130, 149. Forward and backward pass of
// experts on both threads, other work included: 320, 167 by torch's grouped_mm.
constexpr int64_t kWorthSplitting = 64;

Matmul float_matmul(const MatmulParams& params) {
  const bool worth = std::min({params.out.rows, params.out.columns, params.a.columns}) >= kWorthSplitting;
  return worth && has_amx() ? tile_matmul_cpu : matmul_cpu;
}

// Views of raw memory carry no autograd state: the caller's thread may be one that autograd knows nothing of.
Tensor as_tensor(ScalarType dtype, const Matrix& m) {
  return torch::stable::from_blob(m.data, {m.rows, m.columns}, {m.row_stride, m.column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

Matrix matrix_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

constexpr int64_t kRowStep = 32;

// `a` with zeros behind every row. The matrix units read rows of `a` in such steps, and oneDNN (of torch 2.13) has
// them multiply by zero what lies behind a row: a NaN there, of the next row or of nobody, comes into the result.
Tensor with_zeros_behind_rows(const Matrix& a) {
  const Tensor view = as_tensor(ScalarType::BFloat16, a);
  const int64_t padded = (a.columns + kRowStep - 1) / kRowStep * kRowStep;
  Tensor rows = torch::stable::new_empty(view, {a.rows, padded});
  torch::stable::zero_(rows);
  Tensor part = torch::stable::narrow(rows, 1, 0, a.columns);
  torch::stable::copy_(part, view);
  return part;
}

// oneDNN's.
void torch_bf16_matmul(const MatmulParams& params) {
  static const bool amx = machine_has_amx();
  const Tensor out = as_tensor(ScalarType::BFloat16, params.out);
  const bool has_tail = amx && params.a.columns % kRowStep != 0;
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{
      from(has_tail ? with_zeros_behind_rows(params.a) : as_tensor(ScalarType::BFloat16, params.a)),
      from(as_tensor(ScalarType::BFloat16, params.b)), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that the call returns
}

// GFLOP/s of each of two threads of the same machine: torch (oneDNN), ours by the matrix units [264, 512] x
// [1024, 512]^T 571, 793; [264, 1024] x [1024, 512] 844, 859; [512, 528]^T x [528, 512] 558, 837; with 16 instead of
// 264 rows 165, 213; [64, 64] x [64, 64] 26, 242. Deeper ones lose: [512, 2048] x [512, 2048]^T 880, 767.
Matmul tile_matmul_or_torch(const MatmulParams& params) {
  const auto is_dense = [](const Matrix& m) { return std::min(m.row_stride, m.column_stride) == 1; };
  const int64_t depth = params.a.columns;
  const bool serves = depth >= 1 && depth <= kTileMatmulDepth && is_dense(params.a) && is_dense(params.b);
  return serves && has_amx() ? tile_matmul_cpu : torch_bf16_matmul;
}

// torch multiplies float16 element by element where the machine has no float16 arithmetic.
void float16_matmul(const MatmulParams& params) {
  const Tensor wide_a = torch::stable::to(as_tensor(ScalarType::Half, params.a), ScalarType::Float);
  const Tensor wide_b = torch::stable::to(as_tensor(ScalarType::Half, params.b), ScalarType::Float);
  const Tensor wide_out = torch::stable::new_empty(wide_a, {params.out.rows, params.out.columns}, ScalarType::Float);
  const MatmulParams wide{DType::kFloat32, matrix_of(wide_a), matrix_of(wide_b), matrix_of(wide_out)};
  float_matmul(wide)(wide);
  Tensor out = as_tensor(ScalarType::Half, params.out);
  torch::stable::copy_(out, wide_out);
}

// A block of `params.out` and what it is made of.
MatmulParams block_of(const MatmulParams& params, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      int64_t item) {
  const auto at = [&](const Matrix& m, int64_t i, int64_t j) {
    return static_cast<char*>(m.data) + (i * m.row_stride + j * m.column_stride) * item;
  };
  const auto& [dtype, a, b, out, add] = params;
  return {dtype,
          {at(a, row, 0), rows, a.columns, a.row_stride, a.column_stride},
          {at(b, 0, column), b.rows, columns, b.row_stride, b.column_stride},
          {at(out, row, column), rows, columns, out.row_stride, out.column_stride},
          add};
}

// Blocks of the output on all threads. No sum depends on where they are cut.
void on_threads(Matmul matmul, const MatmulParams& params, int64_t item) {
  constexpr int64_t kSmallest = 96;
  const int64_t threads = torch::stable::get_num_threads();
  int64_t rows = std::min<int64_t>(params.out.rows, 1024), columns = std::min<int64_t>(params.out.columns, 1536);
  const auto blocks = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
  const auto tasks = [&] { return blocks(params.out.rows, rows) * blocks(params.out.columns, columns); };
  while (tasks() < threads && rows > kSmallest) rows = (rows + 15) / 16 * 8;
  while (tasks() < threads && columns > kSmallest) columns = (columns + 95) / 96 * 48;
  // As many blocks, of equal heights: after a short last block, threads would wait for each other.
  rows = blocks(blocks(params.out.rows, blocks(params.out.rows, rows)), 8) * 8;
  const int64_t across = blocks(params.out.columns, columns);
  run_tasks(tasks(), [&](int64_t task) {
    const int64_t i = task / across * rows, j = task % across * columns;
    matmul(
        block_of(params, i, std::min(rows, params.out.rows - i), j, std::min(columns, params.out.columns - j), item));
  });
}

// What a thread multiplies a block by, or nullptr where torch's product on all threads is faster or the only one. With
// matrix units, TFLOP/s of two threads, torch and a block per thread, November 2026:
//   our product [32000, 1024] x [1024, 512] 1.27, 1.46 (depth 512: 1.44, 1.60; 256: 1.29, 1.42; 64: 0.78, 0.68),
//     [1024, 512] x [512, 32000] 1.77, 1.64 and x [512, 50257] 1.47, 1.51, [1024, 256] x [256, 32000] 1.53, 1.41;
//   oneDNN's, of which torch leaves some products to one thread, with 16384 deep: [1024, .] x [., 256] 1.84, 1.81,
//     x [., 384] 0.90, 1.62, x [., 512] 0.89, 1.65, x [., 896] 1.86, 1.65; [256, .] x [., 512] 1.53, 1.24,
//     [512, .] 0.82, 1.41, [1280, .] 0.92, 1.72, [2048, .] 1.78, 1.77.
Matmul block_matmul(const MatmulParams& params) {
  constexpr int64_t kWorthTiles = 512;  // of depth
  if (params.dtype != DType::kBFloat16 || !has_amx()) return own_matmul(params.dtype);
  const Matmul matmul = tile_matmul_or_torch(params);
  if (matmul == tile_matmul_cpu) return params.a.columns >= kWorthTiles ? matmul : nullptr;
  const bool on_one_thread = params.out.rows >= 512 && params.out.rows < 1536 && params.out.columns >= 256 &&
                             params.out.columns < 1024 && params.a.columns > kTileMatmulDepth;
  return on_one_thread && !params.add && params.a.columns % kRowStep == 0 ? matmul : nullptr;
}

// out = a b or out + a b on all threads. False, and nothing done, where torch is to do it.
// By our own product, the bits of a row do not depend on how many there are.
bool matmul_(Tensor out, Tensor a, Tensor b, bool add) {
  const DType dtype = float_dtype("matmul_", "out", out);
  check_shape("matmul_", "a", a, "[M, K]", {kAny, kAny});
  check_shape("matmul_", "b", b, "[K, N]", {a.size(1), kAny});
  check_shape("matmul_", "out", out, "[M, N]", {a.size(0), b.size(1)});
  check_same_dtype("matmul_", "a", a, "out", out);
  check_same_dtype("matmul_", "b", b, "out", out);
  check(out.size(1) <= 1 || out.stride(1) == 1, "matmul_", "out", "have dense rows", std::to_string(out.stride(1)));
  const MatmulParams params{dtype, matrix_of(a), matrix_of(b), matrix_of(out), add};
  const Matmul matmul = block_matmul(params);
  if (matmul == nullptr) return false;
  if (out.numel() == 0) return true;
  on_threads(matmul, params, out.element_size());
  return true;
}

}  // namespace

void fastest_matmul(const MatmulParams& params) {
  if (params.out.rows == 0 || params.out.columns == 0) return;
  if (params.dtype == DType::kFloat32) return float_matmul(params)(params);
  if (const Matmul matmul = own_matmul(params.dtype)) return matmul(params);
  (params.dtype == DType::kBFloat16 ? tile_matmul_or_torch(params) : float16_matmul)(params);
}

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) { m.def("matmul_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> bool"); }
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) { m.impl("matmul_", TORCH_BOX(&matmul_)); }

}  // namespace arfast
