#pragma once

#include "../types.h"

namespace gafext {

// h = x weight^T + bias;  out = h[:, :inner] * gelu(h[:, inner:]),  gelu(g) = g/2 (1 + erf(g / sqrt 2))
//
//   x (rows, in_features)   weight (2 * inner, in_features)   bias (2 * inner) or null   out (rows, inner), contiguous
//
// The value half comes first and the gate second: GEGLU of arXiv 2002.05202 (equation 6), diffusers' GEGLU.
struct GegluArgs {
  const void *x, *weight, *bias;
  void* out;
  int64_t rows, in_features, inner;
  int64_t x_stride, weight_stride;  // from row to row
  DType dtype;
};

// The second half of GEGLU where another library has computed the first, h = projected.
//
//   projected (rows, 2 * inner)   out (rows, inner), contiguous
struct GegluGateArgs {
  const void* projected;
  void* out;
  int64_t rows, inner;
  int64_t projected_stride;  // from row to row
  DType dtype;
};

// The gradient of that for `projected`: [grad * gelu(gate), grad * value * gelu'(gate)].
//
//   grad (rows, inner)   projected (rows, 2 * inner)   out (rows, 2 * inner), contiguous
struct GegluGateBackwardArgs {
  const void *grad, *projected;
  void* out;
  int64_t rows, inner;
  int64_t grad_stride, projected_stride;  // from row to row
  DType dtype;
};

#ifdef GAFEXT_WITH_CUDA
GAFEXT_LOCAL cudaError_t geglu_gate_cuda(const GegluGateArgs& args, cudaStream_t stream);
GAFEXT_LOCAL cudaError_t geglu_gate_backward_cuda(const GegluGateBackwardArgs& args, cudaStream_t stream);
#endif

}  // namespace gafext
