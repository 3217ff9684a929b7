// What the attention kernels on mma.sync share: swizzled tiles in shared memory and the work of a block. Their online
// softmax and the layout of their scores and outputs: softmax.cuh.
#pragma once

#include "../ops/flash_attention.h"
#include "softmax.cuh"

namespace gafext::cuda {

// Where the 16-byte chunk `chunk` of row `row` starts, in elements, in a tile of rows of kDim elements. ldmatrix reads
// one chunk of 8 neighbouring rows at once: with n = kDim / 8 chunks per row, n = odd * 2^k, those 8 lie on 8 different
// groups of 4 banks when the low min(k, 3) bits of the chunk are xored with the next bits of the row. No padding.
template <int kDim>
__device__ inline int swizzled(int row, int chunk) {
  constexpr int kChunks = kDim / 8;
  constexpr int kBits = kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : kChunks % 2 == 0 ? 1 : 0;
  return row * kDim + (chunk ^ (row >> (3 - kBits) & ((1 << kBits) - 1))) * 8;
}

__host__ __device__ constexpr int power_of_2_up_to(int n) { return n < 2 ? n : 2 * power_of_2_up_to(n / 2); }

// Rows first .. first + kRows of a (length, columns) matrix into a tile of kDim columns, by all threads of the block;
// zeros outside of the matrix. The columns go in parts of a power of 2 chunks, 80 as 64 and 16: a thread then stays in
// one column, and its rows are a multiple of 8 apart, where the swizzle repeats: both addresses grow by constants.
template <typename T, int kRows, int kDim, int kThreads, int kFirstChunk = 0>
__device__ inline void copy_tile(T* tile, const T* matrix, int row_stride, int first, int length, int columns) {
  constexpr int kLeft = kDim / 8 - kFirstChunk, kPart = power_of_2_up_to(kLeft < kThreads / 8 ? kLeft : kThreads / 8);
  constexpr int kRowsAtOnce = kThreads / kPart;
  const int thread = threadIdx.x, row = thread / kPart, chunk = kFirstChunk + thread % kPart;
  const T* from = matrix + static_cast<int64_t>(first + row) * row_stride + chunk * 8;
  const int rows = chunk * 8 < columns ? length - first - row : 0;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce) {
    if (kRows % kRowsAtOnce != 0 && row + i >= kRows) break;
    copy_16_async(tile + swizzled<kDim>(row + i, chunk), from + static_cast<int64_t>(i) * row_stride, i < rows);
  }
  if constexpr (kFirstChunk + kPart < kDim / 8) {
    copy_tile<T, kRows, kDim, kThreads, kFirstChunk + kPart>(tile, matrix, row_stride, first, length, columns);
  }
}

// Fragments of mma_16x8x16 from a swizzled tile. A: columns 16 k .. of rows 0 .. 16 kRowTiles.
template <int kDim, typename T, int kRowTiles>
__device__ inline void load_a(uint32_t (&a)[kRowTiles][4], const T* tile, int k) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    load_matrices(a[m], tile + swizzled<kDim>(16 * m + lane % 16, 2 * k + lane / 16));
  }
}
// Two of B side by side, from rows 16 i .. and columns 16 j .. : of keys, whose rows are the columns of the product.
template <int kDim, typename T>
__device__ inline void load_b(uint32_t (&b)[4], const T* tile, int i, int j) {
  const int lane = threadIdx.x % kWarp;
  load_matrices(b, tile + swizzled<kDim>(16 * i + lane / 16 * 8 + lane % 8, 2 * j + lane / 8 % 2));
}
// The same of values, whose rows are the depth of the product.
template <int kDim, typename T>
__device__ inline void load_b_transposed(uint32_t (&b)[4], const T* tile, int i, int j) {
  const int lane = threadIdx.x % kWarp;
  load_matrices_transposed(b, tile + swizzled<kDim>(16 * i + lane % 16, 2 * j + lane / 16));
}
// Column tiles n and n + 1 of c += A B.
template <typename T, int kRowTiles, int kTiles>
__device__ inline void multiply(float (&c)[kRowTiles][kTiles][4], int n, const uint32_t (&a)[kRowTiles][4],
                                const uint32_t (&b)[4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    mma_16x8x16(c[m][n], a[m], {b[0], b[1]}, T());
    mma_16x8x16(c[m][n + 1], a[m], {b[2], b[3]}, T());
  }
}

// A block's share of an attention: some rows of one head, and some of the keys they see.
struct Share {
  int split, splits;            // which share of the keys, of how many
  int batch_head, batch, head;  // batch_head = batch * heads + head
  int first_row, first_key, end_key;
};

// Blocks go along the rows of a head, then over its splits: blocks that run together share keys in L2. The last rows
// come first: causal rows see more keys the later they are, and the short ones then fill the gaps at the end.
__device__ inline Share share_of_block(const FlashAttentionArgs& args, int block, int rows, int row_blocks,
                                       int split_keys) {
  const int key_length = static_cast<int>(args.key_length);
  const int splits = max((key_length + split_keys - 1) / split_keys, 1);
  const int row_block = row_blocks - 1 - block % row_blocks;
  Share share{};
  share.splits = splits;
  share.split = block / row_blocks % splits;
  share.batch_head = block / row_blocks / splits;
  share.batch = share.batch_head / static_cast<int>(args.heads);
  share.head = share.batch_head % static_cast<int>(args.heads);
  share.first_row = row_block * rows;
  share.first_key = share.split * split_keys;
  share.end_key = min(share.first_key + split_keys, key_length);
  if (args.is_causal) share.end_key = min(share.end_key, share.first_row + rows);
  return share;
}

// The outputs `out` of rows first_row .. and columns first_column .. of the head; sum[m][r] is that of the whole row.
//
// Final ones, through a tile of kDim columns whose columns first_column .. no other warp touches meanwhile: then a lane
// writes 16 bytes, neighbouring lanes along a row.
template <int kDim, typename T, int kRowTiles, int kTiles>
__device__ inline void store_rows(const FlashAttentionArgs& args, const Share& share,
                                  const float (&out)[kRowTiles][kTiles][4], const float (&sum)[kRowTiles][2],
                                  int first_row, int first_column, T* tile) {
  const int lane = thread_index() % kWarp, first_chunk = first_column / 8;
  float inverse[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) inverse[i / 2][i % 2] = inverse_sum(sum[i / 2][i % 2]);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        T* to = tile + swizzled<kDim>(16 * m + lane / 4 + 8 * r, first_chunk + n) + lane % 4 * 2;
        const float low = out[m][n][2 * r] * inverse[m][r], high = out[m][n][2 * r + 1] * inverse[m][r];
        *reinterpret_cast<uint32_t*>(to) = pack_pair(low, high, T());
      }
    }
  }
  __syncwarp();
  T* matrix = row_of<T>(args.out, args.out_stride, share.batch, share.head, 0);
  const int row_stride = static_cast<int>(args.out_stride.row), length = static_cast<int>(args.query_length);
#pragma unroll
  for (int i = 0; i < 16 * kRowTiles * kTiles / kWarp; ++i) {
    const int row = (i * kWarp + lane) / kTiles, chunk = first_chunk + (i * kWarp + lane) % kTiles;
    if (first_row + row < length && chunk * 8 < static_cast<int>(args.head_dim)) {
      *reinterpret_cast<uint4*>(matrix + static_cast<int64_t>(first_row + row) * row_stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + swizzled<kDim>(row, chunk));
    }
  }
}

// Those of a split, for flash_attention_combine_kernel: for each split, head and row kDim outputs not yet divided by
// the sum, padding included, then (reference, sum) of all of them.
template <int kDim, int kRowTiles, int kTiles>
__device__ inline void store_partial(const FlashAttentionArgs& args, const Share& share,
                                     const float (&out)[kRowTiles][kTiles][4], const float (&sum)[kRowTiles][2],
                                     int first_row, int first_column, const Softmax<kRowTiles>& softmax) {
  const int lane = thread_index() % kWarp;
  const int64_t rows = args.batch * args.heads * args.query_length;
  float* outputs = static_cast<float*>(args.workspace);
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int m = i / 2, r = i % 2, row = first_row + 16 * m + lane / 4 + 8 * r;
    if (row >= args.query_length) continue;
    const int64_t index = share.split * rows + share.batch_head * args.query_length + row;
    float* to = outputs + index * kDim + first_column + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) *reinterpret_cast<float2*>(to + 8 * n) = {out[m][n][2 * r], out[m][n][2 * r + 1]};
    if (first_column == 0 && lane % 4 == 0) {
      float2* statistics = reinterpret_cast<float2*>(outputs + share.splits * rows * kDim);
      statistics[index] = {softmax.reference[m][r], sum[m][r]};
    }
  }
}

}  // namespace gafext::cuda
