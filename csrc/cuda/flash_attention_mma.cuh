// Attention on tensor cores (mma.sync) for heads up to 256, in FlashAttention-2's order of work (arXiv 2307.08691): a
// block keeps some query rows and walks over tiles of keys and values with an online softmax.
//
// Mapping   A warp takes 16 or 32 query rows of one (batch, head), a block 4 warps: 64 or 128 rows. A warp multiplies
//           its queries by all keys of a tile, so that a row's softmax needs 4 lanes and no other warp. The scores' C
//           fragments, packed in pairs, are the A fragments of the product with the values: weights stay in registers.
// Shared    Two stages of (keys, values), swizzled, without padding: 8 kKeys kDim bytes, and 2 kRows kDim more where
//           the queries don't fit the registers. One barrier per tile: after it the tile has arrived and the one before
//           has been read, so the next one's cp.async start, with a whole tile's work to hide behind. At the end the
//           outputs go through the same memory, to be written in 16-byte pieces of whole rows.
// Ends      The last tile and those on the diagonal are masked by a branch that is the same for the whole warp; where
//           at most half a tile of keys is left, they go 16 at a time: 77 keys cost 80, 257 cost 272. Keys and values
//           of 77 fit the two stages as they are; kept longer (257) they would cost blocks on the multiprocessor, and a
//           reference that moves at most once or twice (softmax.cuh) leaves little of the online softmax to save. Tiles
//           beyond a block's diagonal are not read.
// FLOPs     4 Lq Lk kDim per head: 86 GFLOP at (Lq, Lk, D, batch * heads) = (4096, 4096, 64, 20).
// Bytes     From L2: keys and values once per 64 or 128 query rows; 128 rows do 128 FLOPs per byte. From DRAM each
//           input and output once: 42 MB there, 13 us on an H100, where the arithmetic takes 200 us at 430 TFLOP/s.
// Limits    On paper, for a tile of 64 keys and a warp of 32 rows at head 64, counted in the code for sm_80: 635
//           instructions, among them 128 HMMA, 64 MUFU, 32 LDSM, 8 LDGSTS. A quarter of an A100's multiprocessor takes
//           8 cycles for an HMMA (1024 in all), for a MUFU (512) and, of its share of shared memory, 16 for an LDSM
//           (512): bound by the tensor cores, as long as its 2 warps take turns. With 16 rows per warp the LDSM would
//           take as long as the HMMA. Hopper's HMMA is up to twice as fast: there the instructions come next, and wgmma
//           (flash_attention_sm90.cu) saves most of them.
//
// Nothing in this file was measured on a GPU. Shapes were chosen so that ptxas needs no local memory for any of sm_75
// to sm_120, both types, and that two blocks share a multiprocessor of sm_80 and sm_90, but for 160 with long queries
// (registers on sm_80 / 90 / 120):
//   head   long queries: rows, keys; registers, KB      short queries: rows, keys; registers, KB
//     48   128, 64; 204 / 202 / 210, 24                 64, 64; 135 / 136 / 136, 24
//     64   128, 64; 223 / 228 / 239, 32                 64, 64; 143 / 140 / 148, 32
//     80   128, 64; 255 / 254 / 255, 40                 64, 64; 162 / 163 / 168, 40
//     96   128, 32; 204 / 214 / 220, 48 with queries    64, 64; 180 / 180 / 195, 48
//    128   128, 32; 252 / 248 / 255, 64 with queries    64, 64; 207 / 204 / 228, 64
//    160   128, 32; 225 / 236 / 247, 40; 8 warps        64, 32; 225 / 231 / 240, 40
//    256   as for short queries                         64, 16; 235 / 237 / 252, 64 with queries
// Queries in registers save an LDSM for every 4 HMMA; heads of 96 and 128 read them again from shared memory, which
// leaves registers for 32 rows per warp. At 160 even then 32 rows don't fit, and eight warps share the tiles instead.
#pragma once

#include "flash_attention.cuh"
#include "flash_fragments.cuh"

namespace gafext::cuda {

// A block has 16 * kRowTiles query rows per warp; kKeys are those of a tile; kBlocks fit a multiprocessor at once.
template <int kDim_, int kRowTiles_, int kWarps_, int kKeys_, int kBlocks_, bool kQueryShared_>
struct FlashShape {
  static constexpr int kDim = kDim_, kRowTiles = kRowTiles_, kWarps = kWarps_, kKeys = kKeys_, kBlocks = kBlocks_;
  static constexpr bool kQueryShared = kQueryShared_;  // read again for every tile of keys; else in registers
  static constexpr int kThreads = kWarps * kWarp, kWarpRows = 16 * kRowTiles, kRows = kWarps * kWarpRows;
  static constexpr int kTile = kKeys * kDim;                      // elements of one tile of keys
  static constexpr int kQuery = kQueryShared ? kRows * kDim : 0;  // elements
  static constexpr size_t kSharedBytes = sizeof(uint16_t) * (4 * kTile + kQuery);
  static_assert(kRows * kDim <= 4 * kTile, "the outputs are staged where keys and values were");
};

template <typename T, typename Shape>
struct FlashWarp {
  static constexpr int kDim = Shape::kDim, kRowTiles = Shape::kRowTiles;
  uint32_t query[Shape::kQueryShared ? 1 : kDim / 16][kRowTiles][4];
  const T* shared_query;  // [kWarpRows, kDim]
  float out[kRowTiles][kDim / 8][4];
  Softmax<kRowTiles> softmax;
  int row;  // the first

  // 4 bytes per lane and load, straight into the fragments; the two halves of each 32-byte sector meet in the L1 cache.
  __device__ void load_query(const T* matrix, int row_stride, int first, int length, int head_dim) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first + 16 * m + lane / 4 + i % 2 * 8;
        const T* from = matrix + static_cast<int64_t>(row) * row_stride;
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
          const int column = 16 * k + lane % 4 * 2 + i / 2 * 8;
          uint32_t pair = 0;
          if (row < length && column < head_dim) pair = *reinterpret_cast<const uint32_t*>(from + column);
          query[k][m][i] = pair;
        }
      }
    }
  }

  // 16 * kGroups keys of a tile; `first` is the index of the first.
  template <int kGroups>
  __device__ void attend(const FlashAttentionArgs& args, const T* keys, const T* values, int first, int end_key,
                         bool masked) {
    float score[kRowTiles][2 * kGroups][4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      if constexpr (Shape::kQueryShared) load_a<kDim>(query[0], shared_query, k);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        uint32_t b[4];
        load_b<kDim>(b, keys, group, k);
        multiply<T>(score, 2 * group, query[Shape::kQueryShared ? 0 : k], b);
      }
    }
    if (args.scale < 0.0f) negate(score);
    if (masked) mask(score, row, first, end_key, args.is_causal);

    const float scale = base_2_scale(args.scale);
    float maximum[kRowTiles][2];
    row_maxima(score, maximum);
    move_references(maximum, scale, softmax, out);
    const float factor = remaining_scale(score, scale, softmax.huge);

#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t weight[kRowTiles][4];
      weigh<T>(score, 2 * group, factor, softmax, weight);
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];
        load_b_transposed<kDim>(b, values, group, n);
        multiply<T>(out, 2 * n, weight, b);
      }
    }
  }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    flash_attention_mma_kernel(const FlashAttentionArgs args, int row_blocks, int split_keys) {
  T* shared = reinterpret_cast<T*>(dynamic_shared_memory());  // [2 stages][keys, values][kKeys, kDim], [kQuery]
  const int warp = threadIdx.x / kWarp;
  const Share share = share_of_block(args, blockIdx.x, Shape::kRows, row_blocks, split_keys);
  const T* query = row_of<T>(args.query, args.query_stride, share.batch, share.head, 0);
  const T* key = row_of<T>(args.key, args.key_stride, share.batch, share.head, 0);
  const T* value = row_of<T>(args.value, args.value_stride, share.batch, share.head, 0);
  const int query_stride = static_cast<int>(args.query_stride.row), key_stride = static_cast<int>(args.key_stride.row);
  const int value_stride = static_cast<int>(args.value_stride.row);
  const int head_dim = static_cast<int>(args.head_dim), query_length = static_cast<int>(args.query_length);

  const auto copy = [&](T* stage, int first) {
    copy_tile<T, Shape::kKeys, Shape::kDim, Shape::kThreads>(stage, key, key_stride, first, share.end_key, head_dim);
    copy_tile<T, Shape::kKeys, Shape::kDim, Shape::kThreads>(stage + Shape::kTile, value, value_stride, first,
                                                             share.end_key, head_dim);
    copies_commit();
  };
  T* shared_query = shared + 4 * Shape::kTile;
  if constexpr (Shape::kQueryShared) {
    copy_tile<T, Shape::kRows, Shape::kDim, Shape::kThreads>(shared_query, query, query_stride, share.first_row,
                                                             query_length, head_dim);
    copies_commit();  // also where no key follows
  }
  if (share.first_key < share.end_key) copy(shared, share.first_key);

  FlashWarp<T, Shape> my{};
  const int my_row = share.first_row + warp * Shape::kWarpRows;
  my.row = my_row;
  my.shared_query = shared_query + warp * Shape::kWarpRows * Shape::kDim;
  if constexpr (!Shape::kQueryShared) my.load_query(query, query_stride, my_row, query_length, head_dim);
  const int my_end = args.is_causal ? min(share.end_key, my_row + Shape::kWarpRows) : share.end_key;
  int stage = 0;
  for (int first = share.first_key; first < share.end_key; first += Shape::kKeys) {
    copies_wait<0>();
    __syncthreads();  // the tile has arrived, and the one before it has been read
    const T* keys = shared + stage;
    const T* values = keys + Shape::kTile;
    stage ^= 2 * Shape::kTile;
    if (first + Shape::kKeys < share.end_key) copy(shared + stage, first + Shape::kKeys);
    const int seen = my_end - first;
    if (Shape::kKeys <= 32 ? seen > 0 : seen > Shape::kKeys / 2) {
      const bool masked = seen < Shape::kKeys || (args.is_causal && first + Shape::kKeys > my_row + 1);
      my.template attend<Shape::kKeys / 16>(args, keys, values, first, share.end_key, masked);
    } else if constexpr (Shape::kKeys > 32) {
#pragma unroll 1
      for (int i = 0; i < seen; i += 16) {
        my.template attend<1>(args, keys + i * Shape::kDim, values + i * Shape::kDim, first + i, share.end_key, true);
      }
    }
  }

  float sum[Shape::kRowTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * Shape::kRowTiles; ++i) sum[i / 2][i % 2] = quad_sum(my.softmax.sum[i / 2][i % 2]);
  const Share my_share =
      share_of_block(args, block_index(), Shape::kRows, row_blocks, split_keys);  // again: keeping it takes registers
  const int my_first = thread_index() / kWarp * Shape::kWarpRows, first_row = my_share.first_row + my_first;
  copies_wait<0>();
  if (my_share.splits > 1) {
    store_partial<Shape::kDim>(args, my_share, my.out, sum, first_row, 0, my.softmax);
  } else {
    __syncthreads();  // keys and values have been read: room to stage the outputs
    store_rows<Shape::kDim>(args, my_share, my.out, sum, first_row, 0, shared + my_first * Shape::kDim);
  }
}

template <typename T>
cudaError_t flash_attention_mma(const FlashAttentionArgs& args, const FlashPlan& plan, cudaStream_t stream) {
  const auto go = [&](auto longer, auto shorter) {
    const auto launch_shape = [&](auto shape) {
      using Shape = decltype(shape);
      return launch(flash_attention_mma_kernel<T, Shape>, plan.blocks(args), Shape::kThreads, Shape::kSharedBytes,
                    stream, args, plan.row_blocks(args), plan.split_keys);
    };
    return plan.rows == longer.kRows ? launch_shape(longer) : launch_shape(shorter);
  };
  if (plan.columns == 48) return go(FlashShape<48, 2, 4, 64, 2, false>(), FlashShape<48, 1, 4, 64, 3, false>());
  if (plan.columns == 64) return go(FlashShape<64, 2, 4, 64, 2, false>(), FlashShape<64, 1, 4, 64, 3, false>());
  if (plan.columns == 80) return go(FlashShape<80, 2, 4, 64, 2, false>(), FlashShape<80, 1, 4, 64, 3, false>());
  if (plan.columns == 96) return go(FlashShape<96, 2, 4, 32, 2, true>(), FlashShape<96, 1, 4, 64, 2, false>());
  if (plan.columns == 128) return go(FlashShape<128, 2, 4, 32, 2, true>(), FlashShape<128, 1, 4, 64, 2, false>());
  if (plan.columns == 160) return go(FlashShape<160, 1, 8, 32, 1, false>(), FlashShape<160, 1, 4, 32, 2, false>());
  return go(FlashShape<256, 1, 4, 16, 2, true>(), FlashShape<256, 1, 4, 16, 2, true>());
}

}  // namespace gafext::cuda
