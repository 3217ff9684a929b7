#pragma once

#include "../types.h"

namespace gafext {

struct PixelStrides {
  int64_t image, row, column;
};

// out[n,:,y,x] = bias + sum_{i,j,c} weight[:,c,i,j] x[n,c,y+i-1,x+j-1]
//
//   x (batch, in_channels, height, width), channels contiguous   weight (out_channels, in_channels, 3, 3), contiguous
//   bias (out_channels) or null   out (batch, out_channels, height, width), channels-last contiguous
//
// Outside of the picture x is zero.
struct Conv3x3Args {
  const void *x, *weight, *bias;
  void* out;
  int64_t batch, height, width, in_channels, out_channels;
  PixelStrides x_stride;
  DType dtype;
};

}  // namespace gafext
