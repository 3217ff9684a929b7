#include "conv3x3.h"

#include "../convolution.h"
#include "../cpu/dispatch.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, conv3x3, const Conv3x3Args& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) {
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None) -> Tensor");
  m.def("conv3x3_input_gradient(Tensor grad, Tensor weight) -> Tensor");
}

Tensor conv3x3_on_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                      std::optional<Tensor> residual) {
  const char* op = "conv3x3";
  check_convolution(op, x, weight);
  check_same_kind(op, {"x", x}, {"weight", weight});
  check_addends(op, x, weight, bias, residual);
  Conv3x3Args args{};
  args.dtype = check_dtype(op, x);
  set_addends(op, args, bias, residual);
  return convolve(op, args, x, weight, weight.size(0), bias, cpu::conv3x3);
}

// The gradient of conv3x3 for x: a convolution with the weight's other transpose, its taps reversed.
Tensor conv3x3_input_gradient_on_cpu(const Tensor& grad, const Tensor& weight) {
  const char* op = "conv3x3_input_gradient";
  require(grad.dim() == 4, op, ": grad must have shape (batch, channels, height, width), got ", shape_of(grad));
  require(weight.dim() == 4 && weight.size(0) == grad.size(1) && weight.size(2) == 3 && weight.size(3) == 3, op,
          ": weight must have shape (", grad.size(1), ", in_channels, 3, 3) to go with grad ", shape_of(grad), ", got ",
          shape_of(weight));
  check_same_kind(op, {"grad", grad}, {"weight", weight});
  Conv3x3Args args{};
  args.dtype = check_dtype(op, grad);
  args.is_gradient = true;
  return convolve(op, args, grad, weight, weight.size(1), std::nullopt, cpu::conv3x3, "grad");
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3_on_cpu));
  m.impl("conv3x3_input_gradient", TORCH_BOX(&conv3x3_input_gradient_on_cpu));
}

}  // namespace
}  // namespace gafext
