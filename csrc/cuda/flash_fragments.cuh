// What the attention kernels on mma.sync share: swizzled tiles in shared memory, and the online softmax on fragments.
//
// A warp's scores and outputs are C fragments of mma_16x8x16 (device.cuh), [row tile of 16][column tile of 8][4]: lane
// 4 g + t holds rows g and g + 8 of a tile, so that a row lies in the four lanes of one g.
#pragma once

#include "../ops/flash_attention.h"
#include "common.cuh"

namespace gafext::cuda {

// Where the 16-byte chunk `chunk` of row `row` starts, in elements, in a tile of rows of kDim elements. ldmatrix reads
// one chunk of 8 neighbouring rows at once: with n = kDim / 8 chunks a row, n = odd * 2^k, those 8 lie on 8 different
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
  constexpr int kStep = kThreads / kPart;
  const int thread = threadIdx.x, row = thread / kPart, chunk = kFirstChunk + thread % kPart;
  const T* from = matrix + static_cast<int64_t>(first + row) * row_stride + chunk * 8;
  const int rows = chunk * 8 < columns ? length - first - row : 0;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    if (kRows % kStep != 0 && row + i >= kRows) break;
    copy_16_async(tile + swizzled<kDim>(row + i, chunk), from + static_cast<int64_t>(i) * row_stride, i < rows);
  }
  if constexpr (kFirstChunk + kPart < kDim / 8) {
    copy_tile<T, kRows, kDim, kThreads, kFirstChunk + kPart>(tile, matrix, row_stride, first, length, columns);
  }
}

// Scores are compared in base 2: x = score * scale, weight = 2^(x - reference). Any reference cancels out in the end;
// the running maximum (arXiv 1805.02867) is one that cannot overflow. Here a row's reference moves, and what it has
// added up is scaled by 2^(old - new), only when the maximum has passed it by more than kSlack: weights then reach
// 2^8, far below the 65504 of float16, and after the first tile a warp almost never has to scale its outputs.
constexpr float kSlack = 8.0f;
// score * scale - reference is one FMA, which does not round the product as the reference was rounded: an error of
// 2^-24 |reference| in the exponent. Beyond this the product is rounded as well, and equal scores cancel out exactly.
constexpr float kHuge = 4096.0f;
constexpr float kNoReference = -3.402823466e38f;  // finite, so that a row of -inf alone gets weights of 0 and not NaN

template <int kRowTiles>
struct Softmax {
  float reference[kRowTiles][2], sum[kRowTiles][2];  // of rows g and g + 8; the sum over this lane's columns alone
  bool huge;                                         // any reference of the warp is

  __device__ Softmax() : huge(false) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) reference[i / 2][i % 2] = kNoReference, sum[i / 2][i % 2] = 0.0f;
  }
};

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// score * scale as base-2 exponents: never 0, whose product with a masked score is NaN.
__device__ inline float base_2_scale(float scale) {
  const float positive = fabsf(scale) * kLog2E;
  return positive < 1.17549435e-38f ? 1.17549435e-38f : positive;
}

template <int kRowTiles, int kTiles>
__device__ inline void negate(float (&score)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kTiles * 4; ++i) {
    float& x = score[i / (4 * kTiles)][i / 4 % kTiles][i % 4];
    x = -x;
  }
}

// Hides the keys from end_key on and, where is_causal, those that come after their row: -inf. The fragments' first row
// and first key have the indices `row` and `key`.
template <int kRowTiles, int kTiles>
__device__ inline void mask(float (&score)[kRowTiles][kTiles][4], int row, int key, int end_key, bool is_causal) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int m = i / 2, r = i % 2, row_end = row + 16 * m + 8 * r + lane / 4 + 1;
    const int limit = (is_causal ? min(end_key, row_end) : end_key) - key - lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (8 * n >= limit) score[m][n][2 * r] = -INFINITY;
      if (8 * n + 1 >= limit) score[m][n][2 * r + 1] = -INFINITY;
    }
  }
}

// The maximum of each row over the tiles, in the four lanes of the row.
template <int kRowTiles, int kTiles>
__device__ inline void row_maxima(const float (&score)[kRowTiles][kTiles][4], float (&maximum)[kRowTiles][2]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) x = fmaxf(x, fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1]));
      maximum[m][r] = quad_max(x);
    }
  }
}

// Moves the references that the maxima of new scores ask for, with the sums and the outputs so far.
template <int kRowTiles, int kTiles>
__device__ inline void move_references(const float (&maximum)[kRowTiles][2], float scale, Softmax<kRowTiles>& softmax,
                                       float (&out)[kRowTiles][kTiles][4]) {
  bool moves = false;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    moves |= maximum[i / 2][i % 2] * scale - softmax.reference[i / 2][i % 2] > kSlack;
  }
  if (!__any_sync(kAllLanes, moves)) return;

  bool huge = false;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float old = softmax.reference[m][r], x = maximum[m][r] * scale;
      const bool moves_row = x - old > kSlack;
      const float factor = moves_row ? exp2_approximate(old - x) : 1.0f;
      if (moves_row) softmax.reference[m][r] = x;
      huge |= fabsf(softmax.reference[m][r]) > kHuge;
      softmax.sum[m][r] *= factor;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) out[m][n][2 * r] *= factor, out[m][n][2 * r + 1] *= factor;
    }
  }
  softmax.huge = __any_sync(kAllLanes, huge);
}

// Scores become exponents still to be multiplied by the result: `scale`, or 1 where they are huge and were multiplied.
template <int kRowTiles, int kTiles>
__device__ inline float remaining_scale(float (&score)[kRowTiles][kTiles][4], float scale, bool huge) {
  if (!huge) return scale;
#pragma unroll
  for (int i = 0; i < kRowTiles * kTiles * 4; ++i) score[i / (4 * kTiles)][i / 4 % kTiles][i % 4] *= scale;
  return 1.0f;
}

// The weights of 16 columns, n and n + 1 of the tiles, as the A fragment of the product with the values.
template <typename T, int kRowTiles, int kTiles>
__device__ inline void weigh(const float (&score)[kRowTiles][kTiles][4], int n, float scale,
                             Softmax<kRowTiles>& softmax, uint32_t (&weight)[kRowTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // as the A fragment has it: rows g and g + 8 of the first tile, then of the second
      const float reference = softmax.reference[m][i % 2];
      const float low = exp2_approximate(fmaf(score[m][n + i / 2][i % 2 * 2], scale, -reference));
      const float high = exp2_approximate(fmaf(score[m][n + i / 2][i % 2 * 2 + 1], scale, -reference));
      softmax.sum[m][i % 2] += low + high;
      weight[m][i] = pack_pair(low, high, T());
    }
  }
}

// out * inverse to rows first .. of `matrix`, through the chunks from first_chunk on of a tile of kDim columns that no
// other warp touches meanwhile: 16 bytes a lane, neighbouring lanes along a row.
template <int kDim, typename T, int kRowTiles, int kTiles>
__device__ inline void store_rows(const float (&out)[kRowTiles][kTiles][4], const float (&inverse)[kRowTiles][2],
                                  T* tile, int first_chunk, T* matrix, int row_stride, int first, int length,
                                  int columns) {
  const int lane = thread_index() % kWarp;
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
#pragma unroll
  for (int i = 0; i < 16 * kRowTiles * kTiles / kWarp; ++i) {
    const int row = (i * kWarp + lane) / kTiles, chunk = first_chunk + (i * kWarp + lane) % kTiles;
    if (first + row < length && chunk * 8 < columns) {
      *reinterpret_cast<uint4*>(matrix + static_cast<int64_t>(first + row) * row_stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + swizzled<kDim>(row, chunk));
    }
  }
}

__device__ inline float inverse_of(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }  // nothing seen: zeros

// A block's share of an attention: some rows of one head, and some of the keys they see.
struct Share {
  int split, splits;  // which share of the keys, of how many
  int batch_head;     // batch * heads + head
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
  share.first_row = row_block * rows;
  share.first_key = share.split * split_keys;
  share.end_key = min(share.first_key + split_keys, key_length);
  if (args.is_causal) share.end_key = min(share.end_key, share.first_row + rows);
  return share;
}

// What a split leaves for flash_attention_combine_kernel: for each split, head and row kDim outputs not yet divided by
// the sum, padding included, then (reference, sum) of all of them. The fragments are those of rows first .. and columns
// first_column .. ; `sum` is that of the whole row.
template <int kDim, int kRowTiles, int kTiles>
__device__ inline void store_partial(const FlashAttentionArgs& args, const Share& share,
                                     const float (&out)[kRowTiles][kTiles][4], const float (&sum)[kRowTiles][2],
                                     const Softmax<kRowTiles>& softmax, int first, int first_column) {
  const int lane = thread_index() % kWarp;
  const int64_t rows = args.batch * args.heads * args.query_length;
  float* outputs = static_cast<float*>(args.workspace);
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int m = i / 2, r = i % 2, row = first + 16 * m + lane / 4 + 8 * r;
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
