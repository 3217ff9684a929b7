#include "conv3x3.h"

#include "../convolution.h"
#include "../cpu/dispatch.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, conv3x3, const Conv3x3Args& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) { m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"); }

Tensor conv3x3_on_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  check_convolution("conv3x3", x, weight);
  check_weight_and_bias("conv3x3", x, weight, bias);
  Conv3x3Args args{};
  args.dtype = check_dtype("conv3x3", x);
  return convolve("conv3x3", args, x, weight, bias, cpu::conv3x3);
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) { m.impl("conv3x3", TORCH_BOX(&conv3x3_on_cpu)); }

}  // namespace
}  // namespace gafext
