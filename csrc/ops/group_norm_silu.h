#pragma once

#include "../types.h"

namespace gafext {

constexpr int64_t kMaxGroupChannels = 512;

// out[n,c,p] = f((x[n,c,p] - mean) / sqrt(variance + eps) * weight[c] + bias[c]),  f(y) = y / (1 + exp(-y)) or y
//
//   x (batch, channels, positions), channels contiguous   out like x, in the memory of (batch, positions, channels)
//   weight, bias (channels), contiguous, or null
//
// Mean and (biased) variance are those of an image's group: channels / groups channels next to each other, at all
// positions. GroupNorm of arXiv 1803.08494 and SiLU of arXiv 1606.08415.
struct GroupNormSiluArgs {
  const void *x, *weight, *bias;
  void *out, *scratch;  // scratch: group_norm_silu_scratch() bytes, 8-byte aligned
  int64_t batch, channels, positions, groups;
  int64_t image_stride, position_stride;  // of x
  float eps;
  bool silu;
  DType dtype;
};

#ifdef GAFEXT_WITH_CUDA
GAFEXT_LOCAL cudaError_t group_norm_silu_cuda(const GroupNormSiluArgs& args, cudaStream_t stream);
GAFEXT_LOCAL int64_t group_norm_silu_scratch(const GroupNormSiluArgs& args);
#endif

}  // namespace gafext
