// Attention over the V views of one portrait at each spatial position, in place over the strides: one pass over memory.
//
// Mapping   Three kernels, the first that can serve:
//           tensor cores   float16, bfloat16, V of 5..32, heads up to 128 (64 for V > 16). One (batch, position, head)
//                          per warp: its views are the rows and columns of mma fragments, padded with zeros to 8, 16,
//                          32.
//           packs          Up to 4 views, 8 in float32. As many lanes as hold a row in 16-byte packs (8 at D = 64 in
//                          half precision) take one (batch, position, head): a warp reads rows of 4 heads side by side.
//           any            Every other V, head size and stride: one output row per warp and iteration, element by
//                          element, V reads from L1.
// Shared    For the first two 16 bytes per thread and access: 24 KB per block for packs at V = 4, 12 KB for tensor
//           cores at V = 8, 48 KB at most. A thread reads what it copied itself, so there is no barrier; the copies are
//           there to have all of a thread's accesses in flight before the first is waited for: loads to registers the
//           compiler moves down to their use, those of the values behind the scores.
// FLOPs     4 V^2 D per (position, head): 4 KFLOP at V = 4, D = 64; 16 KFLOP at V = 8.
// Bytes     4 V D elements per (position, head), each read or written once: 2 KB in half precision at V = 4, 21 MB for
//           (batch, V, positions, heads) = (2, 4, 1024, 5): 6.3 us at the 3.35 TB/s of an H100. A multiprocessor's
//           share of that, 14 bytes per clock, leaves time for 570 instructions per (position, head) at V = 4 and 1140
//           at V = 8; counted in the SASS are 208 (packs) and 321 (tensor cores).
// In flight 12 accesses of 16 bytes per lane at V = 4, 6 at V = 8: 100 KB per multiprocessor where all its warps wait,
//           and 16 KB cover the latency. Heads are fastest in the grid, so that neighbouring warps read neighbouring
//           columns.
#include "../ops/cross_view_attention.h"
#include "softmax.cuh"

namespace gafext {
namespace cuda {
namespace {

constexpr int kThreads = 128;

struct Sequence {
  int64_t first_view, head, position;
};
__device__ Sequence sequence_at(const CrossViewAttentionArgs& args, uint32_t index) {
  const uint32_t heads = args.heads, length = args.length, row = index / heads;
  return {row / length * args.views, index % heads, row % length};
}

template <typename T, int kLanes, int kViews>
__global__ void __launch_bounds__(kThreads) packs_kernel(const CrossViewAttentionArgs args, uint32_t sequences) {
  constexpr int kSize = kPackSize<T>;
  using RowPack = Pack<T, kSize>;
  const uint32_t index = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  // Lanes beyond the last sequence repeat it for the shuffles of their warp, and store nothing.
  const Sequence at = sequence_at(args, min(index, sequences - 1));
  const int views = args.views, column = threadIdx.x % kLanes * kSize;
  const bool inside = column < args.head_dim;

  RowPack* mine = reinterpret_cast<RowPack*>(dynamic_shared_memory()) + threadIdx.x;
  RowPack *query = mine, *key = query + kViews * kThreads, *value = key + kViews * kThreads;
  const auto copy = [&](RowPack* target, const void* base, const HeadStrides& stride) {
    const T* row = row_of<T>(base, stride, at.first_view, at.head, at.position) + column;
#pragma unroll
    for (int i = 0; i < kViews; ++i) copy_16_async(target + i * kThreads, row + i * stride.batch, inside && i < views);
  };
  copy(query, args.query, args.query_stride);
  copy(key, args.key, args.key_stride);
  copy(value, args.value, args.value_stride);
  copies_commit();
  copies_wait<0>();

  float weight[kViews][kViews] = {};  // first the scores
  {
    float q[kViews][kSize];
#pragma unroll
    for (int i = 0; i < kViews; ++i) to_floats(query[i * kThreads], q[i]);
#pragma unroll
    for (int j = 0; j < kViews; ++j) {
      float k[kSize];
      to_floats(key[j * kThreads], k);
#pragma unroll
      for (int i = 0; i < kViews; ++i) {
#pragma unroll
        for (int d = 0; d < kSize; ++d) weight[i][j] += q[i][d] * k[d];
        weight[i][j] = warp_sum<kLanes>(weight[i][j]) * (args.scale * kLog2E);
        if (j >= views) weight[i][j] = -INFINITY;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kViews; ++i) {
    float max = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kViews; ++j) max = fmaxf(max, weight[i][j]);
    max = finite_reference(max);
#pragma unroll
    for (int j = 0; j < kViews; ++j) sum += weight[i][j] = exp2_approximate(weight[i][j] - max);
    sum = inverse_sum_approximate(sum);
#pragma unroll
    for (int j = 0; j < kViews; ++j) weight[i][j] *= sum;
  }

  float result[kViews][kSize] = {};
#pragma unroll
  for (int j = 0; j < kViews; ++j) {
    float v[kSize];
    to_floats(value[j * kThreads], v);
#pragma unroll
    for (int i = 0; i < kViews; ++i) {
#pragma unroll
      for (int d = 0; d < kSize; ++d) result[i][d] += weight[i][j] * v[d];
    }
  }
  if (!inside || index >= sequences) return;
  T* out = row_of<T>(args.out, args.out_stride, at.first_view, at.head, at.position) + column;
#pragma unroll
  for (int i = 0; i < kViews; ++i) {
    if (i < views) store_pack(out + i * args.out_stride.batch, from_floats<T>(result[i]));
  }
}

// The kernel on tensor cores: kOctets octets of views, kBlocks blocks of 64 columns, lane = 4 g + t (device.cuh). Which
// column of memory is which column of a fragment is free as long as both factors agree, and is chosen so that every
// access of a lane is 16 bytes, 8 neighbouring columns:
//
// Scores = Q K^T   Of a slice of 32 columns of view 8 o + g a lane has 8 t .. 8 t + 7 as four words of two. A slice is
//                  two steps, products of depth 16; step h takes words 2 h and 2 h + 1 of each lane.
// Out = P V        Of a block of 64 columns of views 8 o + 2 t and 8 o + 2 t + 1 a lane has the 8 below c = g. Product
//                  n takes the n-th of them, so that these columns of memory are column c of product n:
//
//     c =      0   1   2   3   4   5   6   7
//     n = 0    0  32   8  40  16  48  24  56
//     n = 1    1  33   9  41  17  49  25  57
//     n = 2    2  34  10  42  18  50  26  58
//     n = 3    3  35  11  43  19  51  27  59
//     n = 4    4  36  12  44  20  52  28  60
//     n = 5    5  37  13  45  21  53  29  61
//     n = 6    6  38  14  46  22  54  30  62
//     n = 7    7  39  15  47  23  55  31  63
//
// C fragments hold c = 2 t and 2 t + 1: over all n these are columns 8 t .. 8 t + 7 and 32 + 8 t .. of the output.
template <typename T, int kOctets, int kBlocks>
struct TensorWarp {
  static constexpr int kSlices = 2 * kBlocks, kRowTiles = (kOctets + 1) / 2;
  static constexpr int kRows = kOctets > 1 ? 2 : 1;  // of a lane in a row tile of 16 query views: g and g + 8
  using Words = uint32_t[4];                         // 8 elements
  const CrossViewAttentionArgs& args;
  Sequence at;
  int views, dim, g, t;
  Words* copied;  // what this lane has copied, kThreads apart

  __device__ Words& query(int o, int slice) const { return copied[(o * kSlices + slice) * kThreads]; }
  __device__ Words& key(int o, int slice) const { return copied[((kOctets + o) * kSlices + slice) * kThreads]; }
  __device__ Words& value(int o, int odd, int block) const {  // of view 8 o + 2 t + odd
    return copied[((2 * kOctets + o) * kSlices + odd * kBlocks + block) * kThreads];
  }

  __device__ __forceinline__ void copy_views() const {
    const auto copy = [&](Words& target, const void* base, const HeadStrides& stride, int view, int column) {
      const T* row = row_of<T>(base, stride, at.first_view + view, at.head, at.position);
      copy_16_async(&target, row + column, view < views && column < dim);
    };
    const int first = 8 * (g % 2 * 4 + g / 2);  // in the picture, where n = 0 and c = g
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        copy(query(o, slice), args.query, args.query_stride, 8 * o + g, 32 * slice + 8 * t);
        copy(key(o, slice), args.key, args.key_stride, 8 * o + g, 32 * slice + 8 * t);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        copy(value(o, 0, block), args.value, args.value_stride, 8 * o + 2 * t, 64 * block + first);
        copy(value(o, 1, block), args.value, args.value_stride, 8 * o + 2 * t + 1, 64 * block + first);
      }
    }
    copies_commit();
    copies_wait<0>();
  }

  // score[o]: of the query views of row tile m with the key views of octet o.
  __device__ __forceinline__ void score_views(int m, float (&score)[kOctets][4]) const {
#pragma unroll
    for (int step = 0; step < 2 * kSlices; ++step) {
      const int slice = step / 2, word = step % 2 * 2;
      uint32_t a[4] = {query(2 * m, slice)[word], 0, query(2 * m, slice)[word + 1], 0};
      if constexpr (kOctets > 1) {
        a[1] = query(2 * m + 1, slice)[word];
        a[3] = query(2 * m + 1, slice)[word + 1];
      }
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        const uint32_t b[2] = {key(o, slice)[word], key(o, slice)[word + 1]};
        mma_16x8x16(score[o], a, b, T());
      }
    }
  }

  // weight[o][r]: of row r and this lane's two key views of octet o, still to be multiplied by inverse[r].
  __device__ __forceinline__ void weigh_views(float (&score)[kOctets][4], uint32_t (&weight)[kOctets][2],
                                              float (&inverse)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float max = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[o][2 * r + e];
          x = 8 * o + 2 * t + e < views ? x * (args.scale * kLog2E) : -INFINITY;
          max = fmaxf(max, x);
        }
      }
      max = finite_reference(quad_max(max));
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        float (&pair)[2] = reinterpret_cast<float (&)[2]>(score[o][2 * r]);
        weight[o][r] = pack_pair(exp2_approximate(pair[0] - max), exp2_approximate(pair[1] - max), T());
        pair_to_floats<T>(weight[o][r], pair[0], pair[1]);  // rounded, so that they add up to 1
        sum += pair[0] + pair[1];
      }
      inverse[r] = inverse_sum_approximate(warp_sum<4>(sum));  // quad_sum adds in another order
    }
  }

  // result[n]: product n of the picture, for a block of 64 columns.
  __device__ __forceinline__ void multiply_values(const uint32_t (&weight)[kOctets][2], int block,
                                                  float (&result)[8][4]) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const auto nth = [&](int o) {  // element n of the two views of octet o
        const uint32_t even = value(o, 0, block)[n / 2], odd = value(o, 1, block)[n / 2];
        return __byte_perm(even, odd, n % 2 == 0 ? 0x5410 : 0x7632);
      };
#pragma unroll
      for (int k = 0; k < kRowTiles; ++k) {  // 16 key views
        uint32_t a[4] = {weight[2 * k][0], weight[2 * k][1], 0, 0}, b[2] = {nth(2 * k), 0};
        if constexpr (kOctets > 1) {
          a[2] = weight[2 * k + 1][0], a[3] = weight[2 * k + 1][1];
          b[1] = nth(2 * k + 1);
        }
        mma_16x8x16(result[n], a, b, T());
      }
    }
  }

  __device__ __forceinline__ void store_block(int m, int block, const float (&result)[8][4],
                                              const float (&inverse)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int view = 16 * m + 8 * r + g;
      T* out = row_of<T>(args.out, args.out_stride, at.first_view + view, at.head, at.position);
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {  // c = 2 t + odd
        const int column = 64 * block + 32 * odd + 8 * t;
        float x[8];
#pragma unroll
        for (int n = 0; n < 8; ++n) x[n] = result[n][2 * r + odd] * inverse[r];
        if (view < views && column < dim) store_pack(out + column, from_floats<T>(x));
      }
    }
  }
};

template <typename T, int kOctets, int kBlocks>
__global__ void __launch_bounds__(kThreads, kOctets < 4 ? 1 : 3)
    tensor_kernel(const CrossViewAttentionArgs args, uint32_t sequences) {
  using Warp = TensorWarp<T, kOctets, kBlocks>;
  const uint32_t index = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= sequences) return;
  const int lane = threadIdx.x % kWarp;
  auto* copied = reinterpret_cast<typename Warp::Words*>(dynamic_shared_memory()) + threadIdx.x;
  const int views = args.views, dim = args.head_dim;
  const Warp warp{args, sequence_at(args, index), views, dim, lane / 4, lane % 4, copied};
  warp.copy_views();
#pragma unroll
  for (int m = 0; m < Warp::kRowTiles; ++m) {
    float score[kOctets][4] = {}, inverse[Warp::kRows];
    uint32_t weight[kOctets][2] = {};
    warp.score_views(m, score);
    warp.weigh_views(score, weight, inverse);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      float result[8][4] = {};
      warp.multiply_values(weight, block, result);
      warp.store_block(m, block, result, inverse);
    }
  }
}

// A lane holds columns lane, lane + 32, ...; the score with view j is summed over the warp and kept by lane j.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads) any_kernel(const CrossViewAttentionArgs args, uint32_t sequences) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t index = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= sequences) return;
  const Sequence at = sequence_at(args, index);

  for (int i = 0; i < args.views; ++i) {
    const T* query = row_of<T>(args.query, args.query_stride, at.first_view + i, at.head, at.position);
    float q[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = c * kWarp + lane;
      q[c] = d < args.head_dim ? static_cast<float>(query[d]) : 0.0f;
    }

    float score = -INFINITY;  // of query view i with view `lane`
    for (int j = 0; j < args.views; ++j) {
      const T* key = row_of<T>(args.key, args.key_stride, at.first_view + j, at.head, at.position);
      float product = 0.0f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = c * kWarp + lane;
        if (d < args.head_dim) product += q[c] * static_cast<float>(key[d]);
      }
      product = warp_sum(product) * (args.scale * kLog2E);
      if (lane == j) score = product;
    }

    const float weight = exp2_approximate(score - finite_reference(warp_max(score)));
    const float inverse = inverse_sum_approximate(warp_sum(weight));

    float result[kChunks] = {};
    for (int j = 0; j < args.views; ++j) {
      const float w = __shfl_sync(kAllLanes, weight, j) * inverse;
      const T* value = row_of<T>(args.value, args.value_stride, at.first_view + j, at.head, at.position);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = c * kWarp + lane;
        if (d < args.head_dim) result[c] += w * static_cast<float>(value[d]);
      }
    }
    T* out = row_of<T>(args.out, args.out_stride, at.first_view + i, at.head, at.position);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = c * kWarp + lane;
      if (d < args.head_dim) out[d] = static_cast<T>(result[c]);
    }
  }
}

struct Launch {
  const CrossViewAttentionArgs& args;
  cudaStream_t stream;
  int64_t sequences;

  template <typename Kernel>
  cudaError_t operator()(Kernel* kernel, int lanes, int packs) const {
    const int64_t blocks = (sequences * lanes + kThreads - 1) / kThreads;
    return launch(kernel, blocks, kThreads, packs * kThreads * 16, stream, args, static_cast<uint32_t>(sequences));
  }
};

bool all_take_packs(const CrossViewAttentionArgs& args) {
  const auto rows = [&](const void* base, const HeadStrides& stride) {
    return takes_packs(base, stride.batch | stride.head | stride.row, args.dtype);
  };
  return takes_packs(nullptr, args.head_dim, args.dtype) && rows(args.query, args.query_stride) &&
         rows(args.key, args.key_stride) && rows(args.value, args.value_stride) && rows(args.out, args.out_stride);
}

template <typename T, int kBlocks>
cudaError_t launch_tensor(const Launch& launch) {
  if (launch.args.views <= 8) return launch(tensor_kernel<T, 1, kBlocks>, kWarp, 6 * kBlocks);
  if (launch.args.views <= 16) return launch(tensor_kernel<T, 2, kBlocks>, kWarp, 12 * kBlocks);
  return launch(tensor_kernel<T, 4, 1>, kWarp, 24);
}

template <typename T, int kViews>
cudaError_t launch_packs(const Launch& launch) {
  const int64_t packs = launch.args.head_dim / kPackSize<T>;
  if (packs <= 8) return launch(packs_kernel<T, 8, kViews>, 8, 3 * kViews);
  if (packs <= 16) return launch(packs_kernel<T, 16, kViews>, 16, 3 * kViews);
  return launch(packs_kernel<T, 32, kViews>, 32, 3 * kViews);
}

template <typename T>
cudaError_t launch_for(const Launch& launch) {
  const int64_t views = launch.args.views, dim = launch.args.head_dim;
  if (all_take_packs(launch.args)) {
    if constexpr (sizeof(T) == 2) {
      if (views > 4 && dim <= (views > 16 ? 64 : 128) && multiplies_matrices(launch.args.dtype)) {
        return dim <= 64 ? launch_tensor<T, 1>(launch) : launch_tensor<T, 2>(launch);
      }
    } else {
      if (views > 4 && views <= 8 && dim <= kWarp * kPackSize<T>) return launch_packs<T, 8>(launch);
    }
    if (views <= 4 && dim <= kWarp * kPackSize<T>) return launch_packs<T, 4>(launch);
  }
  return with_chunks(dim, [&](auto chunks) { return launch(any_kernel<T, decltype(chunks)::value>, kWarp, 0); });
}

}  // namespace
}  // namespace cuda

cudaError_t cross_view_attention_cuda(const CrossViewAttentionArgs& args, cudaStream_t stream) {
  using namespace cuda;
  const Launch launch{args, stream, args.batch * args.length * args.heads};
  if (launch.sequences > UINT32_MAX) return cudaErrorInvalidConfiguration;
  return with_element_type(args.dtype, [&](auto element) { return launch_for<decltype(element)>(launch); });
}

}  // namespace gafext
