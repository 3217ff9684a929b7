#include "conv3x3.h"

#include "../cpu/dispatch.h"
#include "../tensors.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, conv3x3, const Conv3x3Args& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) { m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"); }

Conv3x3Args check_conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "conv3x3";
  require(x.dim() == 4, op, ": x must have shape (batch, channels, height, width), got ", shape_of(x));
  require(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3, op,
          ": weight must have shape (out_channels, ", x.size(1), ", 3, 3) to go with x ", shape_of(x), ", got ",
          shape_of(weight));
  check_weight_and_bias(op, x, weight, bias);
  check_float32(op, x);
  require(x.size(1) >= 1, op, ": channels must be at least 1, got ", shape_of(x));
  check_channels_last(op, x);

  Conv3x3Args args{};
  args.x = static_cast<const float*>(x.const_data_ptr());
  args.batch = x.size(0), args.in_channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  args.out_channels = weight.size(0);
  args.x_stride = {x.stride(0), x.stride(2), x.stride(3)};
  return args;
}

Tensor conv3x3_on_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  Conv3x3Args args = check_conv3x3(x, weight, bias);
  const Tensor taps = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  const int64_t channels = args.out_channels, row = channels * args.width;
  Tensor out = empty_strided(x, {args.batch, channels, args.height, args.width}, {row * args.height, 1, row, channels});
  args.weight = static_cast<const float*>(taps.const_data_ptr());
  args.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  args.out = static_cast<float*>(out.mutable_data_ptr());
  cpu::conv3x3(args);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) { m.impl("conv3x3", TORCH_BOX(&conv3x3_on_cpu)); }

}  // namespace
}  // namespace gafext
