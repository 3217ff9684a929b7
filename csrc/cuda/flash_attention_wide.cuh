// Attention on tensor cores for one wide head, up to 512 columns: the outputs of 32 rows don't fit the registers of a
// warp, so the eight warps of a block divide the columns.
//
// Mapping   A block takes 64 (or 32) query rows: kGroups = 2 (1) groups of 32 rows x kParts = 4 (8) parts, a warp each.
//           Scores: of 128 keys a part takes 32 (16), over all columns of the head. The parts exchange the maxima of
//           their rows, move the references alike, and leave their weights in shared memory. Outputs: a part takes 128
//           (64) of the columns, over all 128 keys: 128 (64) registers per thread.
// Shared    Queries 64 KB (32), weights 16 KB (8), and a ring of three 16 KB chunks through which keys (128 x 64
//           columns) and values (16 x 512) stream: two are in flight while one is read, one barrier per chunk. 129 KB
//           fit sm_80, 90, 100; 89 KB fit the 99 KB of sm_86, 89, 120. Turing's 64 KB are too few.
// FLOPs     4 Lq Lk 512: 34 GFLOP at 4096 tokens.
// Bytes     Keys and values from L2 once per 64 (32) rows: 64 (32) FLOPs per byte, so that 300 TFLOP/s would need 4.7
//           TB/s of it. Few rows (1024 tokens are 16 blocks of 64) leave multiprocessors idle: hence the blocks of 32,
//           and keys split over blocks (flash_attention.cu).
// Limits    On paper, for 64 rows and 64 keys on an A100: HMMA 4096 cycles; shared memory 1280 for P V and 2048 for
//           Q K^T (32 keys per warp; 16 keys would take 3072). A head this wide has 8 times the products per
//           exponential of head 64. One block of 8 warps per multiprocessor: 249 / 252 / 255 registers (32 rows: 188 /
//           188 / 198) on sm_80 / 90 / 120, no local memory. Nothing was measured on a GPU.
#pragma once

#include "flash_attention.cuh"
#include "flash_fragments.cuh"

namespace gafext::cuda {

// Warps are kGroups groups of rows x kParts parts of the keys (scores) or of the columns (outputs).
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

// The chunks of all tiles in the order of use, through a ring of slots: two are in flight while one is read.
template <typename T, typename Shape>
struct ChunkRing {
  T* slots;
  const T *key, *value;
  int key_stride, value_stride, head_dim;
  const Share& share;
  int chunks;

  __device__ void copy(int index) const {
    if (index < chunks) {
      T* slot = slots + index % Shape::kSlots * Shape::kChunk;
      const int first = share.first_key + index / Shape::kChunks * Shape::kKeys, chunk = index % Shape::kChunks;
      if (chunk < Shape::kKeyChunks) {
        const int column = chunk * Shape::kChunkColumns;
        copy_tile<T, Shape::kKeys, Shape::kChunkColumns, Shape::kThreads>(slot, key + column, key_stride, first,
                                                                          share.end_key, head_dim - column);
      } else {
        copy_tile<T, Shape::kChunkKeys, Shape::kDim, Shape::kThreads>(
            slot, value, value_stride, first + (chunk - Shape::kKeyChunks) * Shape::kChunkKeys, share.end_key,
            head_dim);
      }
    }
    copies_commit();
  }

  // Chunk `index`, for all threads, which are done with the one before it: the copy two chunks ahead overwrites that.
  __device__ const T* next(int index) const {
    copies_wait<Shape::kSlots - 2>();
    __syncthreads();
    copy(index + Shape::kSlots - 1);
    return slots + index % Shape::kSlots * Shape::kChunk;
  }
};

template <typename T, typename Shape>
struct WideWarp {
  static constexpr int kDim = Shape::kDim, kKeys = Shape::kKeys, kRowTiles = Shape::kRowTiles;
  const T* queries;  // [32, kDim], of the group
  T* weights;        // [32, kKeys], of the group
  float* of_parts;   // [kParts, kRows], from the group's first row on: maxima, in the end sums
  int part;

  // The products of the group's rows with the part's keys, as the ring brings them.
  __device__ __forceinline__ void score_tile(const ChunkRing<T, Shape>& ring, int tile,
                                             float (&score)[kRowTiles][Shape::kPartKeys / 8][4]) const {
#pragma unroll 1
    for (int chunk = 0; chunk < Shape::kKeyChunks; ++chunk) {
      const T* keys = ring.next(tile * Shape::kChunks + chunk);
#pragma unroll
      for (int k = 0; k < Shape::kChunkColumns / 16; ++k) {
        uint32_t a[kRowTiles][4];
        load_a<kDim>(a, queries + chunk * Shape::kChunkColumns, k);  // whole groups of 8 chunks: no swizzle
#pragma unroll
        for (int n = 0; n < Shape::kPartKeys / 16; ++n) {
          uint32_t b[4];
          load_b<Shape::kChunkColumns>(b, keys, part * (Shape::kPartKeys / 16) + n, k);
          multiply<T>(score, 2 * n, a, b);
        }
      }
    }
  }

  // Combines the x of each row from all parts, for all of them; with a barrier of the block.
  template <typename Combine>
  __device__ __forceinline__ void exchange(float (&x)[kRowTiles][2], const Combine& combine) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      if (lane % 4 == 0) of_parts[part * Shape::kRows + 8 * i + lane / 4] = x[i / 2][i % 2];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      float all = of_parts[8 * i + lane / 4];
#pragma unroll
      for (int p = 1; p < Shape::kParts; ++p) all = combine(all, of_parts[p * Shape::kRows + 8 * i + lane / 4]);
      x[i / 2][i % 2] = all;
    }
  }

  // The weights of the part's keys, for all parts.
  __device__ __forceinline__ void store_weights(float (&score)[kRowTiles][Shape::kPartKeys / 8][4], float scale,
                                                Softmax<kRowTiles>& softmax) const {
    const int lane = threadIdx.x % kWarp;
    const float factor = remaining_scale(score, scale, softmax.huge);
#pragma unroll
    for (int n = 0; n < Shape::kPartKeys / 16; ++n) {
      uint32_t weight[kRowTiles][4];
      weigh<T>(score, 2 * n, factor, softmax, weight);
#pragma unroll
      for (int i = 0; i < 4 * kRowTiles; ++i) {
        const int row = 16 * (i / 4) + lane / 4 + i % 2 * 8;
        const int chunk = part * (Shape::kPartKeys / 8) + 2 * n + i % 4 / 2;
        *reinterpret_cast<uint32_t*>(weights + swizzled<kKeys>(row, chunk) + lane % 4 * 2) = weight[i / 4][i % 4];
      }
    }
  }

  // The part's columns of the outputs, over all keys of the tile; ring.next waits for the weights of the other parts.
  __device__ __forceinline__ void accumulate(const ChunkRing<T, Shape>& ring, int tile,
                                             float (&out)[kRowTiles][Shape::kPartColumns / 8][4]) const {
#pragma unroll 1
    for (int chunk = 0; chunk < kKeys / Shape::kChunkKeys; ++chunk) {
      const T* values = ring.next(tile * Shape::kChunks + Shape::kKeyChunks + chunk);
      uint32_t a[kRowTiles][4];
      load_a<kKeys>(a, weights, chunk);
#pragma unroll
      for (int n = 0; n < Shape::kPartColumns / 16; ++n) {
        uint32_t b[4];
        load_b_transposed<kDim>(b, values + part * Shape::kPartColumns, 0, n);
        multiply<T>(out, 2 * n, a, b);
      }
    }
  }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    flash_attention_wide_kernel(const FlashAttentionArgs args, int row_blocks, int split_keys) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return;  // Turing's 64 KB of shared memory are too few: never launched there
#endif
  constexpr int kDim = Shape::kDim, kKeys = Shape::kKeys, kRowTiles = Shape::kRowTiles;
  T* queries = reinterpret_cast<T*>(dynamic_shared_memory());                  // [kRows, kDim], at the end the outputs
  T* slots = queries + Shape::kRows * kDim;                                    // [kSlots][kChunk]
  T* weights = slots + Shape::kSlots * Shape::kChunk;                          // [kRows, kKeys]
  float* of_parts = reinterpret_cast<float*>(weights + Shape::kRows * kKeys);  // [kParts, kRows]
  const int warp = threadIdx.x / kWarp, part = warp % Shape::kParts, group_row = warp / Shape::kParts * 32;

  const Share share = share_of_block(args, blockIdx.x, Shape::kRows, row_blocks, split_keys);
  const int tiles = max(share.end_key - share.first_key + kKeys - 1, 0) / kKeys;
  const int my_row = share.first_row + group_row, head_dim = static_cast<int>(args.head_dim);
  copy_tile<T, Shape::kRows, kDim, Shape::kThreads>(
      queries, row_of<T>(args.query, args.query_stride, share.batch, share.head, 0),
      static_cast<int>(args.query_stride.row), share.first_row, static_cast<int>(args.query_length), head_dim);
  const T* key = row_of<T>(args.key, args.key_stride, share.batch, share.head, 0);
  const T* value = row_of<T>(args.value, args.value_stride, share.batch, share.head, 0);
  const int key_stride = static_cast<int>(args.key_stride.row), value_stride = static_cast<int>(args.value_stride.row);
  const ChunkRing<T, Shape> ring{slots, key, value, key_stride, value_stride, head_dim, share, tiles * Shape::kChunks};
  for (int i = 0; i < Shape::kSlots - 1; ++i) ring.copy(i);

  const float scale = base_2_scale(args.scale);
  const WideWarp<T, Shape> my{queries + group_row * kDim, weights + group_row * kKeys, of_parts + group_row, part};
  Softmax<kRowTiles> softmax;
  float out[kRowTiles][Shape::kPartColumns / 8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    float score[kRowTiles][Shape::kPartKeys / 8][4] = {}, maximum[kRowTiles][2];
    my.score_tile(ring, tile, score);
    const int first = share.first_key + tile * kKeys;
    if (args.scale < 0.0f) negate(score);
    if (first + kKeys > share.end_key || (args.is_causal && first + kKeys > my_row + 1)) {
      mask(score, my_row, first + part * Shape::kPartKeys, share.end_key, args.is_causal);
    }
    row_maxima(score, maximum);
    my.exchange(maximum, [](float x, float y) { return fmaxf(x, y); });
    move_references(maximum, scale, softmax, out);  // the same in every part
    my.store_weights(score, scale, softmax);
    my.accumulate(ring, tile, out);
  }

  copies_wait<0>();
  float sum[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) sum[i / 2][i % 2] = quad_sum(softmax.sum[i / 2][i % 2]);
  my.exchange(sum, [](float x, float y) { return x + y; });
  const Share my_share =
      share_of_block(args, block_index(), Shape::kRows, row_blocks, split_keys);  // again: keeping it takes registers
  const int first_row = my_share.first_row + group_row, first_column = part * Shape::kPartColumns;
  if (my_share.splits > 1) {
    store_partial<kDim>(args, my_share, out, sum, first_row, first_column, softmax);
  } else {
    store_rows<kDim>(args, my_share, out, sum, first_row, first_column, queries + group_row * kDim);
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
