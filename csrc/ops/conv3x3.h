#pragma once

#include "../types.h"

namespace gafext {

struct PixelStrides {
  int64_t image, row, column;
};

// out[n,:,y,x] = bias[n] + residual[n,:,y,x] + sum_{i,j,c} weight[:,c,i,j] x[n,c,y+i-1,x+j-1]
//
//   x (batch, in_channels, height, width), channels contiguous   weight (out_channels, in_channels, 3, 3), contiguous
//   bias (batch, out_channels), or null; of one image for all where bias_stride is 0
//   residual (batch, out_channels, height, width), channels contiguous, or null
//   out (batch, out_channels, height, width), channels-last contiguous
//
// Outside of the picture x is zero.
struct Conv3x3Args {
  const void *x, *weight, *bias, *residual;
  void* out;
  int64_t batch, height, width, in_channels, out_channels;
  PixelStrides x_stride, residual_stride;
  int64_t bias_stride;  // from image to image
  // Instead of `weight`, a convolution's whose input gradient this is: the memory is (in_channels, out_channels, 3, 3),
  // and the taps are counted from the last.
  bool is_gradient;
  DType dtype;
};

}  // namespace gafext
