// One launcher per attention kernel; flash_attention.cu chooses.
#pragma once

#include "../ops/flash_attention.h"
#include "common.cuh"

namespace gafext::cuda {

enum class FlashKernel { kSimple, kMma, kWide, kSm90 };

// The columns that the tensor-core kernels work with; those beyond head_dim are zeros.
constexpr int kHeadSizes[] = {48, 64, 80, 96, 128, 160, 256, 512};

// How the tensor-core kernels divide the work over blocks.
struct FlashPlan {
  FlashKernel kernel;
  int columns;     // one of kHeadSizes
  int rows;        // of the queries, per block
  int splits;      // of the keys; with more than one the results are partial ones
  int split_keys;  // keys of a split

  int row_blocks(const FlashAttentionArgs& args) const {
    return static_cast<int>((args.query_length + rows - 1) / rows);
  }
  int64_t blocks(const FlashAttentionArgs& args) const { return args.batch * args.heads * row_blocks(args) * splits; }
};

// Everything, up to a head_dim of 256.
cudaError_t flash_attention_simple(const FlashAttentionArgs& args, cudaStream_t stream);

// Half precision by tensor cores, up to a head_dim of 256; T is __half or, from capability 80 on, __nv_bfloat16.
// plan.rows is 128 or 64; 64 for head_dim > 160.
template <typename T>
cudaError_t flash_attention_mma(const FlashAttentionArgs& args, const FlashPlan& plan, cudaStream_t stream);

// The same for a head_dim up to 512, from capability 80 on; plan.rows is 64 (a block takes 129 KB of shared memory) or
// 32 (89 KB).
template <typename T>
cudaError_t flash_attention_wide(const FlashAttentionArgs& args, const FlashPlan& plan, cudaStream_t stream);

// The partial results in args.workspace become the output.
template <typename T>
cudaError_t flash_attention_combine(const FlashAttentionArgs& args, const FlashPlan& plan, cudaStream_t stream);

}  // namespace gafext::cuda
