// What the arguments of operations are made of.
//
// Free of torch headers, because the kernels include this. In every argument struct of csrc/ops strides count elements
// and the last dimension of a tensor is contiguous; accumulation is in float32 whatever the dtype.
#pragma once

#include <cstdint>

#ifdef GAFEXT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

// For a function that another source of this module defines: without a definition, linking fails and not the import.
#define GAFEXT_LOCAL __attribute__((visibility("hidden")))

namespace gafext {

enum class DType { kFloat32, kFloat16, kBFloat16 };

constexpr int64_t kMaxHeadDim = 256;  // of the attention kernels; larger heads go to PyTorch's operation

// Strides of a (batch, heads, length, head_dim) tensor; that of head_dim is 1.
struct HeadStrides {
  int64_t batch, head, row;
};

// Whether rows of 2-byte elements can be copied 16 bytes at a time, as the tensor-core kernels do.
inline bool has_aligned_rows(const void* base, const HeadStrides& stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride.batch % 8 == 0 && stride.head % 8 == 0 &&
         stride.row % 8 == 0;
}

}  // namespace gafext
