// Binding of swiglu: schema, checks, allocation and the choice of the implementation.
#include "swiglu/swiglu.h"

#include <tuple>

#include "binding/tensor.h"

namespace arfast {
namespace {

constexpr const char* kOp = "swiglu";

void check_like_gate(const char* argument, const Tensor& tensor, const Tensor& gate) {
  check_shape(kOp, argument, tensor, "[N, I]", {gate.size(0), gate.size(1)});
  check_same_dtype(kOp, argument, tensor, "gate", gate);
  check_same_device(kOp, argument, tensor, "gate", gate);
}

Tensor swiglu_forward(Tensor gate, Tensor up) {
  check_shape(kOp, "gate", gate, "[N, I]", {kAny, kAny});
  const DType dtype = float_dtype(kOp, "gate", gate);
  check_like_gate("up", up, gate);
  gate = with_dense_rows(gate);
  up = with_dense_rows(up);
  Tensor out = new_empty(gate, {gate.size(0), gate.size(1)}, gate.scalar_type());
  if (out.numel() == 0) return out;
  const SwigluForwardParams params{
      .dtype = dtype,
      .num_rows = gate.size(0),
      .size = gate.size(1),
      .gate = gate.data_ptr(),
      .up = up.data_ptr(),
      .gate_stride = gate.stride(0),
      .up_stride = up.stride(0),
      .out = out.data_ptr(),
  };
  run(kOp, gate, params, swiglu_forward_cpu, swiglu_forward_cuda);
  return out;
}

// -> (dgate [N, I], dup [N, I])
std::tuple<Tensor, Tensor> swiglu_backward(Tensor dout, Tensor gate, Tensor up) {
  check_shape(kOp, "gate", gate, "[N, I]", {kAny, kAny});
  const DType dtype = float_dtype(kOp, "gate", gate);
  check_like_gate("up", up, gate);
  check_like_gate("dout", dout, gate);
  dout = with_dense_rows(dout);
  gate = with_dense_rows(gate);
  up = with_dense_rows(up);
  Tensor dgate = new_empty(gate, {gate.size(0), gate.size(1)}, gate.scalar_type());
  Tensor dup = new_empty(gate, {gate.size(0), gate.size(1)}, gate.scalar_type());
  if (dgate.numel() == 0) return {dgate, dup};
  const SwigluBackwardParams params{
      .dtype = dtype,
      .num_rows = gate.size(0),
      .size = gate.size(1),
      .dout = dout.data_ptr(),
      .gate = gate.data_ptr(),
      .up = up.data_ptr(),
      .dout_stride = dout.stride(0),
      .gate_stride = gate.stride(0),
      .up_stride = up.stride(0),
      .dgate = dgate.data_ptr(),
      .dup = dup.data_ptr(),
  };
  run(kOp, gate, params, swiglu_backward_cpu, swiglu_backward_cuda);
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(arfast, m) {
  m.def("swiglu_forward(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CPU, m) {
  m.impl("swiglu_forward", TORCH_BOX(&swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}
STABLE_TORCH_LIBRARY_IMPL(arfast, CUDA, m) {
  m.impl("swiglu_forward", TORCH_BOX(&swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace arfast
