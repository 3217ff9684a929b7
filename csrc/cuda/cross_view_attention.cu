// Attention over the V views of one portrait at each spatial position, in place over the strides: one pass over memory.
//
// Three kernels, the first that can serve:
//   tensor cores   float16, bfloat16, V of 5..32, heads of up to 128 (64 for V > 16). A warp takes one (batch,
//                  position, head): its views are the rows and columns of mma fragments, padded with zeros to 8,
//                  16, 32.
//   packs          up to 4 views, 8 in float32. As many lanes as hold a row in 16-byte packs (8 at D = 64 in half
//                  precision) take one (batch, position, head), so that a warp reads the rows of 4 heads side by side.
//   any            every other V, head size and stride: a warp an output row, element by element, V reads from L1.
//
// Shared    of the first two 16 bytes a thread and access: 24 KB a block for packs at V = 4, 12 KB for tensor cores at
//           V = 8, 48 KB at most. A thread reads what it copied itself, so there is no barrier; it is the way to have
//           all of a thread's accesses under way before the first is waited for: loads to registers the compiler
//           moves down to their use, those of the values behind the scores.
// FLOPs     4 V^2 D a (position, head): 4 KFLOP at V = 4, D = 64; 16 KFLOP at V = 8.
// Bytes     4 V D elements a (position, head), each read or written once: 2 KB in half precision at V = 4, 21 MB for
//           (batch, V, positions, heads) = (2, 4, 1024, 5): 6.3 us at the 3.35 TB/s of an H100. A multiprocessor's
//           share of that, 14 bytes a clock, leaves time for 570 instructions a (position, head) at V = 4 and 1140
//           at V = 8; counted in the SASS are 208 (packs) and 321 (tensor cores).
// In flight 12 accesses of 16 bytes a lane at V = 4, 6 at V = 8: 100 KB a multiprocessor where all its warps wait, and
//           16 KB cover the latency. Heads are fastest in the grid, so that neighbouring warps read neighbouring
//           columns.
#include "../ops/cross_view_attention.h"
#include "common.cuh"

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

// What turns scores into weights, -inf for all of them into zeros.
__device__ inline float finite_reference(float max) { return max == -INFINITY ? 0.0f : max; }
__device__ inline float inverse_or_zero(float sum) { return sum == 0.0f ? 0.0f : reciprocal_approximate(sum); }

template <int kLanes>
__device__ float sum_over_lanes(float x) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
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
        weight[i][j] = sum_over_lanes<kLanes>(weight[i][j]) * (args.scale * kLog2E);
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
    sum = inverse_or_zero(sum);
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
  T* out = const_cast<T*>(row_of<T>(args.out, args.out_stride, at.first_view, at.head, at.position)) + column;
#pragma unroll
  for (int i = 0; i < kViews; ++i) {
    if (i < views) store_pack(out + i * args.out_stride.batch, from_floats<T>(result[i]));
  }
}

// Rows and columns of fragments, lane = 4 g + t (device.cuh). What a fragment calls a column need not be one in
// memory, as long as both factors agree, so every access is 16 bytes:
//   scores = Q K^T   words 2h and 2h+1 of columns 32 s + 8 t.. of a view are this lane's in step 2 s + h
//   out = P V        n-tile n, column c is column 64 u + 8 block(c) + n in memory, block(2t) = t, block(2t+1) = 4 + t
// kOctets: the views in eights. kBlocks: the head in blocks of 64 columns.
template <typename T, int kOctets, int kBlocks>
__global__ void __launch_bounds__(kThreads, kOctets < 4 ? 1 : 3)
    tensor_kernel(const CrossViewAttentionArgs args, uint32_t sequences) {
  constexpr int kSteps = 2 * kBlocks, kRowTiles = (kOctets + 1) / 2;
  const uint32_t index = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= sequences) return;
  const Sequence at = sequence_at(args, index);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, block = g % 2 * 4 + g / 2;
  const int views = args.views, dim = args.head_dim;

  struct Copied {
    uint32_t word[4];  // 8 elements
  };
  Copied* mine = reinterpret_cast<Copied*>(dynamic_shared_memory()) + threadIdx.x;
  const auto query = [&](int o, int s) -> Copied& { return mine[(o * kSteps + s) * kThreads]; };
  const auto key = [&](int o, int s) -> Copied& { return mine[((kOctets + o) * kSteps + s) * kThreads]; };
  const auto value = [&](int o, int e, int u) -> Copied& {
    return mine[((2 * kOctets + o) * kSteps + e * kBlocks + u) * kThreads];
  };
  const auto copy = [&](Copied& target, const void* base, const HeadStrides& stride, int view, int column) {
    const T* row = row_of<T>(base, stride, at.first_view + view, at.head, at.position);
    copy_16_async(&target, row + column, view < views && column < dim);
  };
#pragma unroll
  for (int o = 0; o < kOctets; ++o) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      copy(query(o, s), args.query, args.query_stride, 8 * o + g, 32 * s + 8 * t);
      copy(key(o, s), args.key, args.key_stride, 8 * o + g, 32 * s + 8 * t);
    }
#pragma unroll
    for (int u = 0; u < kBlocks; ++u) {
      copy(value(o, 0, u), args.value, args.value_stride, 8 * o + 2 * t, 64 * u + 8 * block);
      copy(value(o, 1, u), args.value, args.value_stride, 8 * o + 2 * t + 1, 64 * u + 8 * block);
    }
  }
  copies_commit();
  copies_wait<0>();

#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    float score[kOctets][4] = {};
#pragma unroll
    for (int s = 0; s < 2 * kSteps; ++s) {
      const int first = s % 2 * 2;
      uint32_t a[4] = {query(2 * m, s / 2).word[first], 0, query(2 * m, s / 2).word[first + 1], 0};
      if constexpr (kOctets > 1) {
        a[1] = query(2 * m + 1, s / 2).word[first];
        a[3] = query(2 * m + 1, s / 2).word[first + 1];
      }
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        const uint32_t b[2] = {key(o, s / 2).word[first], key(o, s / 2).word[first + 1]};
        mma_16x8x16(score[o], a, b, T());
      }
    }

    constexpr int kRows = kOctets > 1 ? 2 : 1;  // g and g + 8
    uint32_t weight[kOctets][2] = {};           // of a row and a pair of keys
    float inverse[kRows];
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
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
      max = finite_reference(fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2)));
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        float (&pair)[2] = reinterpret_cast<float (&)[2]>(score[o][2 * r]);
        weight[o][r] = pack_pair(exp2_approximate(pair[0] - max), exp2_approximate(pair[1] - max), T());
        pair_to_floats<T>(weight[o][r], pair[0], pair[1]);  // rounded, so that they add up to 1
        sum += pair[0] + pair[1];
      }
      inverse[r] = inverse_or_zero(sum_over_lanes<4>(sum));
    }

#pragma unroll
    for (int u = 0; u < kBlocks; ++u) {
      float result[8][4] = {};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int k = 0; k < kRowTiles; ++k) {
          uint32_t a[4] = {weight[2 * k][0], weight[2 * k][1], 0, 0}, b[2] = {0, 0};
          auto views_of = [&](int o) {  // element n of two views
            const uint32_t x = value(o, 0, u).word[n / 2], y = value(o, 1, u).word[n / 2];
            return __byte_perm(x, y, n % 2 == 0 ? 0x5410 : 0x7632);
          };
          b[0] = views_of(2 * k);
          if constexpr (kOctets > 1) {
            a[2] = weight[2 * k + 1][0], a[3] = weight[2 * k + 1][1];
            b[1] = views_of(2 * k + 1);
          }
          mma_16x8x16(result[n], a, b, T());
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int view = 16 * m + 8 * r + g;
        T* out = const_cast<T*>(row_of<T>(args.out, args.out_stride, at.first_view + view, at.head, at.position));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = 64 * u + 32 * half + 8 * t;
          float x[8];
#pragma unroll
          for (int n = 0; n < 8; ++n) x[n] = result[n][2 * r + half] * inverse[r];
          if (view < views && column < dim) store_pack(out + column, from_floats<T>(x));
        }
      }
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
      q[c] = d < args.head_dim ? to_float(query[d]) : 0.0f;
    }

    float score = -INFINITY;  // of query view i with view `lane`
    for (int j = 0; j < args.views; ++j) {
      const T* key = row_of<T>(args.key, args.key_stride, at.first_view + j, at.head, at.position);
      float product = 0.0f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = c * kWarp + lane;
        if (d < args.head_dim) product += q[c] * to_float(key[d]);
      }
      product = warp_sum(product) * (args.scale * kLog2E);
      if (lane == j) score = product;
    }

    const float weight = exp2_approximate(score - finite_reference(warp_max(score)));
    const float inverse = inverse_or_zero(warp_sum(weight));

    float result[kChunks] = {};
    for (int j = 0; j < args.views; ++j) {
      const float w = __shfl_sync(kAllLanes, weight, j) * inverse;
      const T* value = row_of<T>(args.value, args.value_stride, at.first_view + j, at.head, at.position);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = c * kWarp + lane;
        if (d < args.head_dim) result[c] += w * to_float(value[d]);
      }
    }
    T* out = const_cast<T*>(row_of<T>(args.out, args.out_stride, at.first_view + i, at.head, at.position));
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = c * kWarp + lane;
      if (d < args.head_dim) out[d] = from_float<T>(result[c]);
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
