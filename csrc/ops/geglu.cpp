#include "geglu.h"

#include "../cpu/dispatch.h"
#include "../projection.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, geglu, const GegluArgs& args)
GAFEXT_CPU_KERNEL(void, geglu_gate, const GegluGateArgs& args)
GAFEXT_CPU_KERNEL(void, geglu_gate_backward, const GegluGateBackwardArgs& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) {
  m.def("geglu(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("geglu_gate(Tensor projected) -> Tensor");
  m.def("geglu_gate_backward(Tensor grad, Tensor projected) -> Tensor");
}

// Sizes and dtype only: the tensors may still need a contiguous copy.
GegluArgs check_geglu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "geglu";
  require(weight.dim() == 2 && weight.size(0) % 2 == 0, op, ": weight must have shape (2 * inner, in_features), got ",
          shape_of(weight));
  check_projection(op, x, weight, bias);

  GegluArgs args{};
  args.dtype = check_dtype(op, x);
  args.rows = row_count(x), args.in_features = weight.size(1), args.inner = weight.size(0) / 2;
  return args;
}

void check_projected(const char* op, const Tensor& projected) {
  const int64_t last = projected.dim() - 1;
  require(last >= 0 && projected.size(last) % 2 == 0, op, ": projected must have shape (..., 2 * inner), got ",
          shape_of(projected));
}

// Checks `projected`, and calls kernel(args) with it or a contiguous copy of it.
template <typename Kernel>
Tensor gate(const Tensor& projected, const Kernel& kernel) {
  check_projected("geglu_gate", projected);
  GegluGateArgs args{};
  args.dtype = check_dtype("geglu_gate", projected);
  args.rows = row_count(projected), args.inner = projected.size(projected.dim() - 1) / 2;
  const Matrix rows(projected);
  Tensor out = empty_projection(projected, args.inner);
  args.projected = rows.tensor.const_data_ptr();
  args.projected_stride = rows.stride;
  args.out = out.mutable_data_ptr();
  kernel(args);
  return out;
}

Tensor geglu_gate_on_cpu(const Tensor& projected) { return gate(projected, cpu::geglu_gate); }

// Checks the inputs, and calls kernel(args) with them or contiguous copies of them.
template <typename Kernel>
Tensor differentiate_gate(const Tensor& grad, const Tensor& projected, const Kernel& kernel) {
  const char* op = "geglu_gate_backward";
  check_projected(op, projected);
  GegluGateBackwardArgs args{};
  args.dtype = check_dtype(op, projected);
  args.rows = row_count(projected), args.inner = projected.size(projected.dim() - 1) / 2;
  bool matches = grad.dim() == projected.dim() && grad.size(grad.dim() - 1) == args.inner;
  for (int64_t i = 0; matches && i + 1 < grad.dim(); ++i) matches = grad.size(i) == projected.size(i);
  require(matches, op, ": grad must have shape (..., inner) to go with projected ", shape_of(projected), ", got ",
          shape_of(grad));
  check_same_kind(op, {"projected", projected}, {"grad", grad});
  const Matrix grad_rows(grad), rows(projected);
  Tensor out = empty_projection(projected, 2 * args.inner);
  args.grad = grad_rows.tensor.const_data_ptr(), args.grad_stride = grad_rows.stride;
  args.projected = rows.tensor.const_data_ptr(), args.projected_stride = rows.stride;
  args.out = out.mutable_data_ptr();
  kernel(args);
  return out;
}

Tensor geglu_gate_backward_on_cpu(const Tensor& grad, const Tensor& projected) {
  return differentiate_gate(grad, projected, cpu::geglu_gate_backward);
}

Tensor geglu_on_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const GegluArgs args = check_geglu(x, weight, bias);
  // A few rows are as fast with the kernel, which rounds once instead of twice.
  const bool in_pairs = multiplies_pairs() && args.in_features % 2 == 0 && Matrix(x).stride % 2 == 0;  // as panels.h
  const bool has_products = instruction_set() == InstructionSet::kAmx || in_pairs;
  const bool matrix_units = args.dtype == DType::kBFloat16 && multiplies_bfloat16() && !has_products;
  if (matrix_units && args.rows >= 16 && args.in_features >= 64) return geglu_gate_on_cpu(aten_linear(x, weight, bias));
  return project(args, x, weight, bias, args.inner, cpu::geglu);
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) {
  m.impl("geglu", TORCH_BOX(&geglu_on_cpu));
  m.impl("geglu_gate", TORCH_BOX(&geglu_gate_on_cpu));
  m.impl("geglu_gate_backward", TORCH_BOX(&geglu_gate_backward_on_cpu));
}

#ifdef GAFEXT_WITH_CUDA

Tensor geglu_gate_on_cuda(const Tensor& projected) {
  const torch::stable::accelerator::DeviceGuard guard(projected.get_device_index());
  return gate(projected, [&](const GegluGateArgs& args) {
    check_launch(geglu_gate_cuda(args, current_stream(projected)), "geglu_gate", "projected", projected);
  });
}

Tensor geglu_gate_backward_on_cuda(const Tensor& grad, const Tensor& projected) {
  const torch::stable::accelerator::DeviceGuard guard(projected.get_device_index());
  return differentiate_gate(grad, projected, [&](const GegluGateBackwardArgs& args) {
    check_launch(geglu_gate_backward_cuda(args, current_stream(projected)), "geglu_gate_backward", "projected",
                 projected);
  });
}

Tensor geglu_on_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_geglu(x, weight, bias);
  return geglu_gate_on_cuda(aten_linear(x, weight, bias));
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CUDA, m) {
  m.impl("geglu", TORCH_BOX(&geglu_on_cuda));
  m.impl("geglu_gate", TORCH_BOX(&geglu_gate_on_cuda));
  m.impl("geglu_gate_backward", TORCH_BOX(&geglu_gate_backward_on_cuda));
}

#endif

}  // namespace
}  // namespace gafext
