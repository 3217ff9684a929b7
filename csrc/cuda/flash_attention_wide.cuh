// Attention on tensor cores for one wide head, up to 512 columns: the outputs of a row do not fit the registers of a
// warp, so the eight warps of a block divide the columns.
#pragma once

#include "flash_attention.cuh"
#include "flash_fragments.cuh"

namespace gafext::cuda {

// Warps are kGroups groups of rows x kParts parts of the keys (while scoring) or of the columns (while adding up).
template <int kGroups_>
struct WideShape {
  static constexpr int kGroups = kGroups_, kParts = 8 / kGroups, kThreads = 8 * kWarp;
  static constexpr int kDim = 512, kRowTiles = 2, kRows = 32 * kGroups, kKeys = 128;
  static constexpr int kPartKeys = kKeys / kParts, kPartColumns = kDim / kParts;
  static constexpr int kChunkColumns = 64, kChunkKeys = 16;  // of a chunk of keys [kKeys, 64], of values [16, kDim]
  static constexpr int kChunk = kKeys * kChunkColumns, kSlots = 3;
  static constexpr int kKeyChunks = kDim / kChunkColumns, kChunks = kKeyChunks + kKeys / kChunkKeys;  // of a tile
  static_assert(kChunk == kChunkKeys * kDim);
  static constexpr int kElements = kRows * kDim + kSlots * kChunk + kRows * kKeys;
  static constexpr size_t kSharedBytes = kElements * sizeof(uint16_t) + kParts * kRows * sizeof(float);
};

// The chunks of all tiles in the order of use, through a ring of slots: two are under way while one is read.
template <typename T, typename Shape>
struct ChunkRing {
  T* slots;
  const T *key, *value;
  int key_stride, value_stride, head_dim, first_key, end_key, chunks;

  __device__ void copy(int index) const {
    if (index < chunks) {
      T* slot = slots + index % Shape::kSlots * Shape::kChunk;
      const int first = first_key + index / Shape::kChunks * Shape::kKeys, chunk = index % Shape::kChunks;
      if (chunk < Shape::kKeyChunks) {
        const int column = chunk * Shape::kChunkColumns;
        copy_tile<T, Shape::kKeys, Shape::kChunkColumns, Shape::kThreads>(slot, key + column, key_stride, first,
                                                                          end_key, head_dim - column);
      } else {
        copy_tile<T, Shape::kChunkKeys, Shape::kDim, Shape::kThreads>(
            slot, value, value_stride, first + (chunk - Shape::kKeyChunks) * Shape::kChunkKeys, end_key, head_dim);
      }
    }
    copies_commit();
  }

  // Chunk `index`, for all threads; the one before it makes room for the one after the next.
  __device__ const T* next(int index) const {
    copies_wait<Shape::kSlots - 2>();
    __syncthreads();
    copy(index + Shape::kSlots - 1);
    return slots + index % Shape::kSlots * Shape::kChunk;
  }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    flash_attention_wide_kernel(const FlashAttentionArgs args, int row_blocks, int split_keys) {
  constexpr int kDim = Shape::kDim, kKeys = Shape::kKeys, kRowTiles = Shape::kRowTiles, kParts = Shape::kParts;
  T* queries = reinterpret_cast<T*>(dynamic_shared_memory());                  // [kRows, kDim], at the end the outputs
  T* slots = queries + Shape::kRows * kDim;                                    // [kSlots][kChunk]
  T* weights = slots + Shape::kSlots * Shape::kChunk;                          // [kRows, kKeys]
  float* of_parts = reinterpret_cast<float*>(weights + Shape::kRows * kKeys);  // [kParts, kRows]: maxima, then sums
  const int lane = threadIdx.x % kWarp, matrix = lane / 8, matrix_row = lane % 8;
  const int warp = threadIdx.x / kWarp, part = warp % kParts, group_row = warp / kParts * 32;

  const Share share = share_of_block(args, blockIdx.x, Shape::kRows, row_blocks, split_keys);
  const int heads = static_cast<int>(args.heads), batch = share.batch_head / heads, head = share.batch_head % heads;
  const int head_dim = static_cast<int>(args.head_dim), query_length = static_cast<int>(args.query_length);
  const int tiles = max(share.end_key - share.first_key + kKeys - 1, 0) / kKeys;
  const int my_row = share.first_row + group_row;
  copy_tile<T, Shape::kRows, kDim, Shape::kThreads>(queries, row_of<T>(args.query, args.query_stride, batch, head, 0),
                                                    static_cast<int>(args.query_stride.row), share.first_row,
                                                    query_length, head_dim);
  const ChunkRing<T, Shape> ring{slots,
                                 row_of<T>(args.key, args.key_stride, batch, head, 0),
                                 row_of<T>(args.value, args.value_stride, batch, head, 0),
                                 static_cast<int>(args.key_stride.row),
                                 static_cast<int>(args.value_stride.row),
                                 head_dim,
                                 share.first_key,
                                 share.end_key,
                                 tiles * Shape::kChunks};
  for (int i = 0; i < Shape::kSlots - 1; ++i) ring.copy(i);

  const float scale = base_2_scale(args.scale);
  Softmax<kRowTiles> softmax;
  float out[kRowTiles][Shape::kPartColumns / 8][4] = {};
  const T* my_queries = queries + group_row * kDim;
  T* my_weights = weights + group_row * kKeys;

  for (int tile = 0; tile < tiles; ++tile) {
    float score[kRowTiles][Shape::kPartKeys / 8][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < Shape::kKeyChunks; ++chunk) {
      const T* keys = ring.next(tile * Shape::kChunks + chunk);
#pragma unroll
      for (int k = 0; k < Shape::kChunkColumns / 16; ++k) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          load_matrices(a[m], my_queries + chunk * Shape::kChunkColumns +  // whole groups of 8 chunks: no swizzle
                                  swizzled<kDim>(16 * m + matrix % 2 * 8 + matrix_row, 2 * k + matrix / 2));
        }
#pragma unroll
        for (int n = 0; n < Shape::kPartKeys / 16; ++n) {
          uint32_t b[4];
          load_matrices(
              b, keys + swizzled<Shape::kChunkColumns>(part * Shape::kPartKeys + 16 * n + matrix / 2 * 8 + matrix_row,
                                                       2 * k + matrix % 2));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            mma_16x8x16(score[m][2 * n], a[m], {b[0], b[1]}, T());
            mma_16x8x16(score[m][2 * n + 1], a[m], {b[2], b[3]}, T());
          }
        }
      }
    }

    const int first = share.first_key + tile * kKeys;
    if (args.scale < 0.0f) negate(score);
    if (first + kKeys > share.end_key || (args.is_causal && first + kKeys > my_row + 1)) {
      mask(score, my_row, first + part * Shape::kPartKeys, share.end_key, args.is_causal);
    }

    // The maximum of a row comes from the parts; every part then moves the row's reference in the same way.
    float maximum[kRowTiles][2];
    row_maxima(score, maximum);
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      if (lane % 4 == 0) {
        of_parts[part * Shape::kRows + group_row + 16 * (i / 2) + lane / 4 + i % 2 * 8] = maximum[i / 2][i % 2];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const float of_part = of_parts[p * Shape::kRows + group_row + 16 * (i / 2) + lane / 4 + i % 2 * 8];
        maximum[i / 2][i % 2] = fmaxf(maximum[i / 2][i % 2], of_part);
      }
    }
    move_references(maximum, scale, softmax, out);
    const float factor = remaining_scale(score, scale, softmax.huge);
#pragma unroll
    for (int n = 0; n < Shape::kPartKeys / 16; ++n) {
      uint32_t weight[kRowTiles][4];
      weigh<T>(score, 2 * n, factor, softmax, weight);
#pragma unroll
      for (int i = 0; i < 4 * kRowTiles; ++i) {
        const int row = 16 * (i / 4) + lane / 4 + i % 2 * 8;
        const int chunk = part * (Shape::kPartKeys / 8) + 2 * n + i % 4 / 2;
        *reinterpret_cast<uint32_t*>(my_weights + swizzled<kKeys>(row, chunk) + lane % 4 * 2) = weight[i / 4][i % 4];
      }
    }

#pragma unroll 1
    for (int chunk = 0; chunk < kKeys / Shape::kChunkKeys; ++chunk) {
      const T* values = ring.next(tile * Shape::kChunks + Shape::kKeyChunks + chunk);
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_matrices(a[m], my_weights + swizzled<kKeys>(16 * m + matrix % 2 * 8 + matrix_row, 2 * chunk + matrix / 2));
      }
#pragma unroll
      for (int n = 0; n < Shape::kPartColumns / 16; ++n) {
        uint32_t b[4];
        load_matrices_transposed(
            b, values + part * Shape::kPartColumns + swizzled<kDim>(matrix % 2 * 8 + matrix_row, 2 * n + matrix / 2));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_16x8x16(out[m][2 * n], a[m], {b[0], b[1]}, T());
          mma_16x8x16(out[m][2 * n + 1], a[m], {b[2], b[3]}, T());
        }
      }
    }
  }

  copies_wait<0>();
  float sum[kRowTiles][2], inverse[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    sum[i / 2][i % 2] = quad_sum(softmax.sum[i / 2][i % 2]);
    if (lane % 4 == 0) {
      of_parts[part * Shape::kRows + group_row + 16 * (i / 2) + lane / 4 + i % 2 * 8] = sum[i / 2][i % 2];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    sum[i / 2][i % 2] = 0.0f;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      sum[i / 2][i % 2] += of_parts[p * Shape::kRows + group_row + 16 * (i / 2) + lane / 4 + i % 2 * 8];
    }
    inverse[i / 2][i % 2] = inverse_of(sum[i / 2][i % 2]);
  }
  const Share my_share =
      share_of_block(args, block_index(), Shape::kRows, row_blocks, split_keys);  // keeping it takes registers
  const int first_row = my_share.first_row + group_row;
  if (my_share.splits > 1) {
    store_partial<kDim>(args, my_share, out, sum, softmax, first_row, part * Shape::kPartColumns);
  } else {
    T* to = const_cast<T*>(
        row_of<T>(args.out, args.out_stride, my_share.batch_head / heads, my_share.batch_head % heads, 0));
    store_rows<kDim>(out, inverse, queries + group_row * kDim, part * (Shape::kPartColumns / 8), to,
                     static_cast<int>(args.out_stride.row), first_row, query_length, head_dim);
  }
}

template <typename T>
cudaError_t flash_attention_wide(const FlashAttentionArgs& args, const FlashPlan& plan, cudaStream_t stream) {
  const auto go = [&](auto shape) {
    using Shape = decltype(shape);
    return launch(flash_attention_wide_kernel<T, Shape>, plan.blocks(args), Shape::kThreads, Shape::kSharedBytes,
                  stream, args, plan.row_blocks(args), plan.split_keys);
  };
  return plan.rows == WideShape<2>::kRows ? go(WideShape<2>()) : go(WideShape<1>());
}

}  // namespace gafext::cuda
