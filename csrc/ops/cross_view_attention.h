#pragma once

#include "../types.h"

namespace gafext {

constexpr int64_t kMaxViews = 32;

// out[b*V+i,h,l,:] = sum_j softmax_j(scale * <query[b*V+i,h,l,:], key[b*V+j,h,l,:]>) value[b*V+j,h,l,:]
//
//   query, key, value, out  (batch * views, heads, length, head_dim), the view index fastest
//
// Attention over the V views of one portrait at each spatial position by itself, in place over the strides: the
// cross-view layer of GAF (arXiv 2412.10209, section 3.2).
struct CrossViewAttentionArgs {
  const void *query, *key, *value;
  void* out;
  int64_t batch, views, heads, length, head_dim;
  HeadStrides query_stride, key_stride, value_stride, out_stride;
  float scale;
  DType dtype;
};

// The gradients of that. With P the weights: dV = P^T dO, dS = scale P * (dO V^T - rowsum(P * dO V^T)), dQ = dS K,
// dK = dS^T Q (FlashAttention, arXiv 2205.14135, appendix B.2); P is computed anew.
struct CrossViewAttentionBackwardArgs {
  const void *grad, *query, *key, *value;
  void *grad_query, *grad_key, *grad_value;
  int64_t batch, views, heads, length, head_dim;
  HeadStrides grad_stride, query_stride, key_stride, value_stride, out_stride;  // the last: of all three results
  float scale;
  DType dtype;
};

#ifdef GAFEXT_WITH_CUDA
GAFEXT_LOCAL cudaError_t cross_view_attention_cuda(const CrossViewAttentionArgs& args, cudaStream_t stream);
GAFEXT_LOCAL cudaError_t cross_view_attention_backward_cuda(const CrossViewAttentionBackwardArgs& args,
                                                            cudaStream_t stream);
#endif

}  // namespace gafext
