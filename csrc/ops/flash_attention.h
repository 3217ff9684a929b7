#pragma once

#include "../types.h"

namespace gafext {

constexpr int64_t kMaxWideHeadDim = 512;  // on CUDA in half precision and by whole 8s only

// out[b,h,i,:] = sum_j softmax_j(scale * <query[b,h,i,:], key[b,h,j,:]>) value[b,h,j,:]
//
//   query, out  (batch, heads, query_length, head_dim)
//   key, value  (batch, heads, key_length, head_dim)
//
// Tiled with an online softmax, so that no (query_length, key_length) matrix exists: FlashAttention (Dao et al., arXiv
// 2205.14135), algorithm 1; the running maximum and sum are equation 3 of arXiv 1805.02867. With is_causal, row i sees
// the keys j <= i (aligned at the top left, as torch's scaled_dot_product_attention has it). Without keys the result is
// zero.
struct FlashAttentionArgs {
  const void *query, *key, *value;
  void* out;
  void* workspace;  // flash_attention_cuda_workspace() bytes on a GPU, null for 0
  int64_t batch, heads, query_length, key_length, head_dim;
  HeadStrides query_stride, key_stride, value_stride, out_stride;
  float scale;
  bool is_causal;
  DType dtype;
};

#ifdef GAFEXT_WITH_CUDA
// Memory that flash_attention_cuda() needs beside the result: partial results, where the keys are split over blocks.
GAFEXT_LOCAL cudaError_t flash_attention_cuda_workspace(const FlashAttentionArgs& args, int64_t& bytes);
// Launches on the current device and returns without waiting; the result is that of the launch.
GAFEXT_LOCAL cudaError_t flash_attention_cuda(const FlashAttentionArgs& args, cudaStream_t stream);

// The kernel for capability 9.0 alone: whether it should have these arguments, and the launch, which runs shorter ones
// too and returns cudaErrorInvalidValue for those it can't. A build without it serves nothing.
#if defined(GAFEXT_WITH_SM90A) || defined(GAFEXT_EMULATOR)
GAFEXT_LOCAL bool serves_sm90(const FlashAttentionArgs& args);
GAFEXT_LOCAL cudaError_t flash_attention_sm90(const FlashAttentionArgs& args, cudaStream_t stream);
#else
inline bool serves_sm90(const FlashAttentionArgs&) { return false; }
inline cudaError_t flash_attention_sm90(const FlashAttentionArgs&, cudaStream_t) {
  return cudaErrorNoKernelImageForDevice;
}
#endif
#endif

}  // namespace gafext
