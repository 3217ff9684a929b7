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

inline void check_addends(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual) {
  const int64_t batch = x.size(0), channels = weight.size(0);
  if (bias) {
    require(bias->dim() >= 1 && bias->dim() <= 2 && bias->size(bias->dim() - 1) == channels &&
                (bias->dim() == 1 || bias->size(0) == batch),
            op, ": bias must have shape (", channels, ",) or (", batch, ", ", channels, ") to go with x ", shape_of(x),
            " and weight ", shape_of(weight), ", got ", shape_of(*bias));
    check_same_kind(op, {"x", x}, {"bias", *bias});
  }
  if (residual) {
    require(residual->dim() == 4 && residual->size(0) == batch && residual->size(1) == channels &&
                residual->size(2) == x.size(2) && residual->size(3) == x.size(3),
            op, ": residual must have shape (", batch, ", ", channels, ", ", x.size(2), ", ", x.size(3),
            ") to go with x ", shape_of(x), " and weight ", shape_of(weight), ", got ", shape_of(*residual));
    check_same_kind(op, {"x", x}, {"residual", *residual});
  }
}

inline PixelStrides pixel_strides(const Tensor& image) { return {image.stride(0), image.stride(2), image.stride(3)}; }

// Sets all of bias and residual but the bias's memory.
template <typename Args>
void set_addends(const char* op, Args& args, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual) {
  if (bias && bias->dim() == 2) args.bias_stride = bias->size(1);
  if (!residual) return;
  check_channels_last(op, {"residual", *residual});
  args.residual = residual->const_data_ptr();
  args.residual_stride = pixel_strides(*residual);
}

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
  const int64_t channels = args.out_channels;
  const int64_t pixel = at_least_one(channels), row = pixel * at_least_one(args.width);
  Tensor out = empty_strided(x, {args.batch, channels, args.height, args.width},
                             {row * at_least_one(args.height), 1, row, pixel});
  args.x = static_cast<decltype(args.x)>(x.const_data_ptr());
  args.weight = static_cast<decltype(args.weight)>(taps.const_data_ptr());
  args.bias = bias ? static_cast<decltype(args.bias)>(bias->const_data_ptr()) : nullptr;
  args.out = static_cast<decltype(args.out)>(out.mutable_data_ptr());
  kernel(args);
  return out;
}

}  // namespace gafext
