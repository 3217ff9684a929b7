// What conv3x3 and conv3x3_int8 share.
#pragma once

#include "tensors.h"

namespace gafext {

inline void check_convolution(const char* op, const Tensor& x, const Tensor& weight) {
  require(x.dim() == 4, op, ": x must have shape (batch, channels, height, width), got ", shape_of(x));
  require(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3, op,
          ": weight must have shape (out_channels, ", x.size(1), ", 3, 3) to go with x ", shape_of(x), ", got ",
          shape_of(weight));
}

inline PixelStrides pixel_strides(const Tensor& image) { return {image.stride(0), image.stride(2), image.stride(3)}; }

// Calls kernel(args) with the tensors' memory in `args`, and returns its output.
template <typename Args, typename Kernel>
Tensor convolve(const char* op, Args args, const Tensor& x, const Tensor& weight, int64_t out_channels,
                std::optional<Tensor> bias, const Kernel& kernel, const char* name = "x") {
  require(x.size(1) >= 1, op, ": channels must be at least 1, got ", shape_of(x));
  check_channels_last(op, {name, x});
  const Tensor taps = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  args.batch = x.size(0), args.in_channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  args.out_channels = out_channels;
  args.x_stride = pixel_strides(x);
  const int64_t channels = args.out_channels, row = channels * args.width;
  Tensor out = empty_strided(x, {args.batch, channels, args.height, args.width}, {row * args.height, 1, row, channels});
  args.x = static_cast<decltype(args.x)>(x.const_data_ptr());
  args.weight = static_cast<decltype(args.weight)>(taps.const_data_ptr());
  args.bias = bias ? static_cast<decltype(args.bias)>(bias->const_data_ptr()) : nullptr;
  args.out = static_cast<decltype(args.out)>(out.mutable_data_ptr());
  kernel(args);
  return out;
}

}  // namespace gafext
