// The kernels of one element type: one file per type, to compile in parallel.
#include "flash_attention_mma.cuh"
#include "flash_attention_wide.cuh"

namespace gafext::cuda {

template cudaError_t flash_attention_mma<__half>(const FlashAttentionArgs&, const FlashPlan&, cudaStream_t);
template cudaError_t flash_attention_wide<__half>(const FlashAttentionArgs&, const FlashPlan&, cudaStream_t);

}  // namespace gafext::cuda
