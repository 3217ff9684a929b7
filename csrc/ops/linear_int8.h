#pragma once

#include "../types.h"

namespace gafext {

// out = s_x scale (q_x weight^T) + bias + residual, q_x = round(x / s_x), s_x = max |x| / 127 of each row
//
//   x (rows, in_features)   weight (out_features, in_features), 8-bit   scale (out_features), float32
//   bias (out_features), like x, or null   residual and out (rows, out_features), like x; residual or null
//
// The sums of products are exact 32-bit integers for in_features up to kMaxInt8Features.
struct LinearInt8Args {
  const void *x, *bias, *residual;
  const float* scale;
  const int8_t* weight;
  void* out;
  int64_t rows, in_features, out_features;
  int64_t x_stride, weight_stride, residual_stride;  // from row to row; out is contiguous
  DType dtype;                                       // of x, bias and out
  // out is (rows, out_features / 2): the columns of the first half times the GELU of those of the second; no residual.
  bool gated;
};

constexpr int64_t kFewestTileRows = 32;
constexpr int64_t kMaxInt8Features = int64_t{1} << 16;  // 2^16 * 255 * 127 < 2^31, where inputs are shifted to 0..255

}  // namespace gafext
