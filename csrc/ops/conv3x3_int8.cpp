#include "conv3x3_int8.h"

#include "../convolution.h"
#include "../cpu/dispatch.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, conv3x3_int8, const Conv3x3Int8Args& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) {
  m.def("conv3x3_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor");
}

Tensor conv3x3_int8_on_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale, std::optional<Tensor> bias) {
  const char* op = "conv3x3_int8";
  check_convolution(op, x, weight);
  require(weight.scalar_type() == ScalarType::Char, op, ": weight must be int8, got ", dtype_name(weight));
  require(weight.device() == x.device(), op, ": weight must be on the device of x");
  check_per_channel(op, x, weight, scale, bias);
  check_float32(op, x);
  const Tensor scales = torch::stable::contiguous(scale);
  Conv3x3Int8Args args{};
  args.scale = static_cast<const float*>(scales.const_data_ptr());
  return convolve(op, args, x, weight, weight.size(0), bias, cpu::conv3x3_int8);
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) { m.impl("conv3x3_int8", TORCH_BOX(&conv3x3_int8_on_cpu)); }

}  // namespace
}  // namespace gafext
