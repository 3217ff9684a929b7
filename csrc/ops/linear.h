#pragma once

#include "../types.h"

namespace gafext {

// out = x weight^T + bias
//
//   x (rows, in_features)   weight (out_features, in_features)   bias (out_features) or null
//   out (rows, out_features), contiguous
struct LinearArgs {
  const void *x, *weight, *bias;
  void* out;
  int64_t rows, in_features, out_features;
  int64_t x_stride, weight_stride;  // from row to row
  DType dtype;
};

}  // namespace gafext
