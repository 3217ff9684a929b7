#pragma once

#include "conv3x3.h"

namespace gafext {

// conv3x3 with the weight scale[o] weight[o,:,:,:], of 8-bit numbers
struct Conv3x3Int8Args {
  const void *x, *bias, *residual;  // the last two as of Conv3x3Args
  const float* scale;               // (out_channels)
  const int8_t* weight;
  void* out;
  int64_t batch, height, width, in_channels, out_channels;
  PixelStrides x_stride, residual_stride;
  int64_t bias_stride;  // from image to image
  bool taps_first;      // the weight's memory is (out_channels, 3, 3, in_channels)
  DType dtype;          // of x, bias and out
};

// Up to these, a direct convolution's sums fit 32 bits: 9 * 7281 * 255 * 127 < 2^31.
constexpr int64_t kMaxDirectChannels = 7281;

}  // namespace gafext
