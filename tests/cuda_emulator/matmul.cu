// A matrix product on tensor cores, small but with all that a fast kernel has: copies two tiles ahead, matrix loads of
// both kinds. It carries the planted faults of tests/test_cuda_emulator.py.
//
// Mapping   a block of 2 warps makes 32 x 32 of the output, a warp 16 rows of it, in steps of 32 of the depth.
// Shared    two stages of 32 rows of a and 32 of b; rows of 40 elements, so that 8 of them lie in different banks.
#include "common.cuh"
#include "unit_kernels.h"

namespace gafext {
namespace cuda {
namespace {

constexpr int kTile = 32, kPitch = 40, kThreads = 64, kChunk = 8;  // elements of a 16-byte copy
constexpr int kStage = 2 * kTile * kPitch;

// A tile of 32 rows of a matrix to shared memory, zeros where it ends.
template <typename T>
__device__ void load_tile(T* tile, const void* matrix, int64_t stride, int64_t row, int64_t rows, int64_t column,
                          int64_t columns) {
  for (int i = threadIdx.x; i < kTile * kTile / kChunk; i += kThreads) {
    const int64_t r = i / (kTile / kChunk), c = i % (kTile / kChunk) * kChunk;
    const bool inside = row + r < rows && column + c < columns;
    const T* source = static_cast<const T*>(matrix) + (inside ? (row + r) * stride + column + c : 0);
    copy_16_async(tile + r * kPitch + c, source, inside);
  }
}

template <typename T, bool b_transposed>
__global__ void matmul_kernel(const MatmulArgs args, int64_t column_blocks) {
  T* shared = reinterpret_cast<T*>(dynamic_shared_memory());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = blockIdx.x / column_blocks * kTile, column = blockIdx.x % column_blocks * kTile;

  const auto load = [&](int stage, int64_t k) {
    T* a = shared + stage * kStage;
    load_tile(a, args.a, args.a_stride, row, args.rows, k, args.depth);
    if (b_transposed) load_tile(a + kTile * kPitch, args.b, args.b_stride, column, args.columns, k, args.depth);
    if (!b_transposed) load_tile(a + kTile * kPitch, args.b, args.b_stride, k, args.depth, column, args.columns);
  };

  float c[kTile / 8][4] = {};
  load(0, 0);
  copies_commit();
  for (int64_t k = 0, stage = 0; k < args.depth; k += kTile, stage ^= 1) {
    if (k + kTile < args.depth) load(stage ^ 1, k + kTile);
    copies_commit();
    copies_wait<1>();
    __syncthreads();  // all of this tile are there
    const T* a_tile = shared + stage * kStage;
    const T* b_tile = a_tile + kTile * kPitch;
    for (int kk = 0; kk < kTile; kk += 16) {
      uint32_t a[4], b[4];
      load_matrices(a, a_tile + (16 * warp + lane % 16) * kPitch + kk + lane / 16 * 8);
      for (int n = 0; n < kTile; n += 16) {
        const int depth = kk + lane / 8 % 2 * 8, columns = n + lane / 16 * 8;
        if (b_transposed) load_matrices(b, b_tile + (columns + lane % 8) * kPitch + depth);
        if (!b_transposed) load_matrices_transposed(b, b_tile + (depth + lane % 8) * kPitch + columns);
        mma_16x8x16(c[n / 8], a, {b[0], b[1]}, T());
        mma_16x8x16(c[n / 8 + 1], a, {b[2], b[3]}, T());
      }
    }
    __syncthreads();  // this tile has been read
  }

  for (int n = 0; n < kTile / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int64_t r = row + 16 * warp + lane / 4 + i / 2 * 8, col = column + 8 * n + lane % 4 * 2 + i % 2;
      if (r < args.rows && col < args.columns) args.out[r * args.out_stride + col] = c[n][i];
    }
  }
}

}  // namespace
}  // namespace cuda

cudaError_t matmul_cuda(const MatmulArgs& args, cudaStream_t stream) {
  using namespace cuda;
  const int64_t row_blocks = (args.rows + kTile - 1) / kTile, column_blocks = (args.columns + kTile - 1) / kTile;
  return with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 4) {
      return cudaErrorInvalidValue;
    } else {
      const auto kernel = args.b_transposed ? matmul_kernel<T, true> : matmul_kernel<T, false>;
      return launch(kernel, row_blocks * column_blocks, kThreads, 2 * kStage * sizeof(T), stream, args, column_blocks);
    }
  });
}

}  // namespace gafext
