#include "conv3x3_int8.h"

#include <vector>

#include "../convolution.h"
#include "../cpu/dispatch.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, conv3x3_int8, const Conv3x3Int8Args& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) {
  m.def(
      "conv3x3_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, "
      "Tensor? residual=None) -> Tensor");
}

// (out_channels, 3, 3, in_channels); contiguous, if the weight is channels-last.
Tensor taps_before_channels(const Tensor& weight) {
  return call_aten("aten::permute", weight, std::vector<int64_t>{0, 2, 3, 1});
}

Tensor conv3x3_int8_on_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale, std::optional<Tensor> bias,
                           std::optional<Tensor> residual) {
  const char* op = "conv3x3_int8";
  check_convolution(op, x, weight);
  require(weight.scalar_type() == ScalarType::Char, op, ": weight must be int8, got ", dtype_name(weight));
  require(weight.device() == x.device(), op, ": weight must be on the device of x");
  check_per_channel(op, x, weight, scale, std::nullopt);
  check_addends(op, x, weight, bias, residual);
  const Tensor scales = torch::stable::contiguous(scale);
  Conv3x3Int8Args args{};
  args.dtype = check_dtype(op, x);
  args.scale = static_cast<const float*>(scales.const_data_ptr());
  set_addends(op, args, bias, residual);
  args.taps_first = has_amx_int8() && x.size(1) <= kMaxDirectChannels;
  const Tensor taps = args.taps_first ? taps_before_channels(weight) : weight;
  return convolve(op, args, x, taps, weight.size(0), bias, cpu::conv3x3_int8);
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) { m.impl("conv3x3_int8", TORCH_BOX(&conv3x3_int8_on_cpu)); }

}  // namespace
}  // namespace gafext
