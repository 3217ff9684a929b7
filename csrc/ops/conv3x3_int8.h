#pragma once

#include "conv3x3.h"

namespace gafext {

// conv3x3 with the weight scale[o] weight[o,:,:,:], of 8-bit numbers
struct Conv3x3Int8Args {
  const float *x, *scale, *bias;  // scale (out_channels); bias (out_channels) or null
  const int8_t* weight;
  float* out;
  int64_t batch, height, width, in_channels, out_channels;
  PixelStrides x_stride;
};

}  // namespace gafext
