// Operations for tests/test_cuda_emulator.py: one warp instruction each, mistakes, and a matrix product.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace gafext {

// out[lane] = __shfl_*_sync(mask, value[lane], argument, width) for the lanes in the mask, else value[lane]; kind: 0
// index, 1 up, 2 down, 3 xor.
struct ShuffleArgs {
  const int* value;
  int* out;
  int kind, mask, argument, width;
};

// out[lane] = ballot, any, all, match_any of value[lane] for the lanes in the mask, else -1. [32, 4]
struct VoteArgs {
  const int* value;
  int* out;
  int mask;
};

// out[lane] = __syncthreads_count, _or, _and of value[thread] in a block of `threads`, of which those from `live` on
// exit before. [threads, 3]
struct BlockVoteArgs {
  const int* value;
  int* out;
  int threads, live;
};

// out[lane] = c[lane] + the product, fragment by fragment. a [32, 4], b [32, 2], c, out [32, 4]
struct MmaArgs {
  const int *a, *b;
  const float* c;
  float* out;
  DType dtype;
};

// out[lane] = the registers of lane: four matrices, [4, 8, 8] of 2 bytes, loaded by one warp. [32, 4]
struct LoadMatricesArgs {
  const int* matrices;
  int* out;
  bool transposed;
};

// out[i] = bits of half, bfloat16, and back, of value[i]. [count, 2], [count, 2]
struct RoundArgs {
  const float* value;
  int* bits;
  float* out;
  int count;
};

// *out = the sum of value[i], by two kernels. workspace: sum_workspace() bytes
struct SumArgs {
  const float* value;
  float* out;
  void* workspace;
  int count;
};
int64_t sum_workspace(const SumArgs& args);

// A block of `threads` that does what mustn't be done; see unit_kernels.cu. in, out [threads + gap]
struct MistakeArgs {
  const int* in;
  int* out;
  int kind, threads;
};

// out = a b^T, a (rows, depth), b (columns, depth); or, with !b_transposed, out = a b, b (depth, columns). Depth, the
// columns of such a b and the strides, from row to row, are multiples of 8. float16 and bfloat16; out float32.
struct MatmulArgs {
  const void *a, *b;
  float* out;
  int64_t rows, columns, depth;
  int64_t a_stride, b_stride, out_stride;
  bool b_transposed;
  DType dtype;
};

cudaError_t shuffle_cuda(const ShuffleArgs& args, cudaStream_t stream);
cudaError_t vote_cuda(const VoteArgs& args, cudaStream_t stream);
cudaError_t block_vote_cuda(const BlockVoteArgs& args, cudaStream_t stream);
cudaError_t mma_cuda(const MmaArgs& args, cudaStream_t stream);
cudaError_t load_matrices_cuda(const LoadMatricesArgs& args, cudaStream_t stream);
cudaError_t round_cuda(const RoundArgs& args, cudaStream_t stream);
cudaError_t sum_cuda(const SumArgs& args, cudaStream_t stream);
cudaError_t mistake_cuda(const MistakeArgs& args, cudaStream_t stream);
cudaError_t matmul_cuda(const MatmulArgs& args, cudaStream_t stream);

}  // namespace gafext
