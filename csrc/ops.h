// The operations of gafext: one argument struct an operation, one prototype an operation and device.
//
// Nothing here knows PyTorch: bindings.cpp checks the tensors (checks.h), fills in the arguments and calls one of
// these. Strides count elements, the last dimension of every tensor is contiguous, and accumulation is in float32
// whatever the dtype.
#pragma once

#include <cstdint>

#ifdef GAFEXT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace gafext {

enum class DType { kFloat32, kFloat16, kBFloat16 };

constexpr int64_t kMaxHeadDim = 256;      // of the attention kernels; larger heads go to PyTorch's operation
constexpr int64_t kMaxWideHeadDim = 512;  // of flash_attention; on CUDA in half precision and by whole 8s only
constexpr int64_t kMaxViews = 32;         // of cross_view_attention

// Strides of a (batch, heads, length, head_dim) tensor; that of head_dim is 1.
struct HeadStrides {
  int64_t batch, head, row;
};

// Whether rows of 2-byte elements can be copied 16 bytes at a time, as the tensor-core kernels do.
inline bool has_aligned_rows(const void* base, const HeadStrides& stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride.batch % 8 == 0 && stride.head % 8 == 0 &&
         stride.row % 8 == 0;
}

// out[b,h,i,:] = sum_j softmax_j(scale * <query[b,h,i,:], key[b,h,j,:]>) value[b,h,j,:]
//
//   query, out  (batch, heads, query_length, head_dim)
//   key, value  (batch, heads, key_length, head_dim)
//
// Tiled with an online softmax, so that no (query_length, key_length) matrix exists: FlashAttention (Dao et al.,
// arXiv 2205.14135), algorithm 1; the running maximum and sum are equation 3 of arXiv 1805.02867. With is_causal,
// row i sees the keys j <= i (aligned at the top left, as torch's scaled_dot_product_attention has it). No key at all
// gives zeros.
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

// out = x weight^T + bias
//
//   x (rows, in_features)   weight (out_features, in_features)   bias (out_features) or null
//   out (rows, out_features), contiguous
//
// float32 only.
struct LinearArgs {
  const float *x, *weight, *bias;
  float* out;
  int64_t rows, in_features, out_features;
  int64_t x_stride, weight_stride;  // from row to row
};

// The second half of GEGLU where the first, h = projected, is another library's work.
//
//   projected (rows, 2 * inner)   out (rows, inner), contiguous
struct GegluGateArgs {
  const void* projected;
  void* out;
  int64_t rows, inner;
  int64_t projected_stride;  // from row to row
  DType dtype;
};

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
constexpr int64_t kMaxGroupChannels = 512;  // channels of a group

// out[n,:,y,x] = bias + sum_{i,j,c} weight[:,c,i,j] x[n,c,y+i-1,x+j-1]
//
//   x (batch, in_channels, height, width), channels contiguous   weight (out_channels, in_channels, 3, 3), contiguous
//   bias (out_channels) or null   out (batch, out_channels, height, width), channels-last contiguous
//
// Outside of the picture x is zero. float32 only.
struct PixelStrides {
  int64_t image, row, column;
};
struct Conv3x3Args {
  const float *x, *weight, *bias;
  float* out;
  int64_t batch, height, width, in_channels, out_channels;
  PixelStrides x_stride;
};

void flash_attention_cpu(const FlashAttentionArgs& args);
void cross_view_attention_cpu(const CrossViewAttentionArgs& args);
void geglu_cpu(const GegluArgs& args);
bool linear_cpu(const LinearArgs& args);  // false where another library does it as fast; `out` is then unfinished
void geglu_gate_cpu(const GegluGateArgs& args);
void conv3x3_cpu(const Conv3x3Args& args);

#ifdef GAFEXT_WITH_CUDA
// Memory that flash_attention_cuda() needs beside the result: partial results, where the keys are split over blocks.
cudaError_t flash_attention_cuda_workspace(const FlashAttentionArgs& args, int64_t& bytes);
// Launch on the current device and return without waiting; the result is that of the launch.
cudaError_t flash_attention_cuda(const FlashAttentionArgs& args, cudaStream_t stream);
cudaError_t cross_view_attention_cuda(const CrossViewAttentionArgs& args, cudaStream_t stream);
cudaError_t geglu_gate_cuda(const GegluGateArgs& args, cudaStream_t stream);
cudaError_t group_norm_silu_cuda(const GroupNormSiluArgs& args, cudaStream_t stream);
int64_t group_norm_silu_scratch(const GroupNormSiluArgs& args);

// The kernel for capability 9.0 alone: whether it should have these arguments, and the launch, which runs shorter ones
// too and returns cudaErrorInvalidValue for those it can't. A build without it serves nothing.
#if defined(GAFEXT_WITH_SM90A) || defined(GAFEXT_EMULATOR)
bool serves_sm90(const FlashAttentionArgs& args);
cudaError_t flash_attention_sm90(const FlashAttentionArgs& args, cudaStream_t stream);
#else
inline bool serves_sm90(const FlashAttentionArgs&) { return false; }
inline cudaError_t flash_attention_sm90(const FlashAttentionArgs&, cudaStream_t) {
  return cudaErrorNoKernelImageForDevice;
}
#endif
#endif

}  // namespace gafext
