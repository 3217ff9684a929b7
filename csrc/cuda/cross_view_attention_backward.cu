// The gradients of cross_view_attention, at each (batch, position, head) by itself, in place over the strides.
//
// Mapping   A group of lanes takes one (batch, position, head); each lane holds the same columns of every row:
//           packs   8, 16 or 32 lanes, as many as hold a row in 16-byte packs (8 at D = 64 in half precision)
//           any     32 lanes, element by element, 2, 4 or 8 columns a lane: every other head size and stride
// Steps     Query view by query view, the scores and the products of its gradient with the values are summed over the
//           group; lane j keeps those of key view j, and puts the weight and the change of the score into shared memory.
//           From there come dQ, and after all query views, key view by key view, dK and dV.
// Shared    2 V^2 numbers per group: 2 KB per block for 8 lanes at V = 4, at most 48 KB.
// FLOPs     10 V^2 D per (position, head), where the forward pass has 4.
// Bytes     4 V D elements read and 3 V D written per (position, head): 3.5 KB in half precision at V = 4, D = 64, 37 MB
//           for (batch, V, positions, heads) = (2, 4, 1024, 5), 11 us at the 3.35 TB/s of an H100. Rows are read 5 V^2
//           + 2 V times in all, from L1 but for the first: 88 accesses of a lane at V = 4, 88 clocks of a
//           multiprocessor per (position, head), whose share of the bandwidth, 14 bytes per clock, takes 256.
#include "../ops/cross_view_attention.h"
#include "softmax.cuh"

namespace gafext {
namespace cuda {
namespace {

constexpr int kThreads = 128;

template <int kLanes>
__device__ float group_max(float x) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// The columns of a row that a lane holds: kChunks runs of kSize, kLanes * kSize apart.
template <typename T, int kLanes, int kSize, int kChunks>
struct Columns {
  float x[kChunks][kSize] = {};

  __device__ void load(const T* row, int lane, int dim) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = (c * kLanes + lane) * kSize;
      Pack<T, kSize> pack{};
      if (column < dim) pack = *reinterpret_cast<const Pack<T, kSize>*>(row + column);  // cached: it is read again
      to_floats(pack, x[c]);
    }
  }
  __device__ void store(T* row, int lane, int dim) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = (c * kLanes + lane) * kSize;
      if (column < dim) store_pack(row + column, from_floats<T>(x[c]));
    }
  }
  __device__ void add(float factor, const Columns& other) {
#pragma unroll
    for (int i = 0; i < kChunks * kSize; ++i) x[i / kSize][i % kSize] += factor * other.x[i / kSize][i % kSize];
  }
  // Over the whole row; every lane of the group gets it.
  __device__ float dot(const Columns& other) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks * kSize; ++i) sum += x[i / kSize][i % kSize] * other.x[i / kSize][i % kSize];
    return warp_sum<kLanes>(sum);
  }
};

template <typename T, int kLanes, int kSize, int kChunks>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const CrossViewAttentionBackwardArgs args, uint32_t sequences) {
  using Row = Columns<T, kLanes, kSize, kChunks>;
  constexpr int kSlots = kMaxViews / kLanes;  // key views of a lane: lane, lane + kLanes, ...
  const uint32_t index = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool inside = index < sequences;  // lanes beyond repeat the last for the shuffles of their warp
  const uint32_t at = min(index, sequences - 1), heads = args.heads, length = args.length;
  const int64_t head = at % heads, position = at / heads % length, first_view = at / heads / length * args.views;
  const int views = args.views, dim = args.head_dim, lane = threadIdx.x % kLanes;
  float* weights = reinterpret_cast<float*>(dynamic_shared_memory()) + threadIdx.x / kLanes * 2 * views * views;
  float* changes = weights + views * views;

  const auto read = [&](const void* base, const HeadStrides& stride, int view) {
    Row row;
    row.load(row_of<T>(base, stride, first_view + view, head, position), lane, dim);
    return row;
  };
  const auto write = [&](const Row& row, void* base, int view) {
    if (inside) row.store(row_of<T>(base, args.out_stride, first_view + view, head, position), lane, dim);
  };

  for (int i = 0; i < views; ++i) {
    const Row query = read(args.query, args.query_stride, i), grad = read(args.grad, args.grad_stride, i);
    float score[kSlots], product[kSlots];  // with this lane's key views; the product is of dO and V
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      score[slot] = -INFINITY, product[slot] = 0.0f;
      for (int l = 0; l < kLanes && slot * kLanes + l < views; ++l) {
        const float s = query.dot(read(args.key, args.key_stride, slot * kLanes + l)) * (args.scale * kLog2E);
        const float p = grad.dot(read(args.value, args.value_stride, slot * kLanes + l));
        if (l == lane) score[slot] = s, product[slot] = p;
      }
    }
    float max = -INFINITY, sum = 0.0f, mean = 0.0f;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) max = fmaxf(max, score[slot]);
    max = finite_reference(group_max<kLanes>(max));
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) sum += score[slot] = exp2_approximate(score[slot] - max);
    const float inverse = inverse_sum(warp_sum<kLanes>(sum));
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) mean += (score[slot] *= inverse) * product[slot];
    mean = warp_sum<kLanes>(mean);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int j = slot * kLanes + lane;
      if (j >= views) continue;
      weights[i * views + j] = score[slot];
      changes[i * views + j] = args.scale * score[slot] * (product[slot] - mean);
    }
    __syncwarp();
    Row grad_query;
    for (int j = 0; j < views; ++j) grad_query.add(changes[i * views + j], read(args.key, args.key_stride, j));
    write(grad_query, args.grad_query, i);
  }
  for (int j = 0; j < views; ++j) {
    Row grad_key, grad_value;
    for (int i = 0; i < views; ++i) {
      grad_key.add(changes[i * views + j], read(args.query, args.query_stride, i));
      grad_value.add(weights[i * views + j], read(args.grad, args.grad_stride, i));
    }
    write(grad_key, args.grad_key, j);
    write(grad_value, args.grad_value, j);
  }
}

bool all_take_packs(const CrossViewAttentionBackwardArgs& args) {
  const auto rows = [&](const void* base, const HeadStrides& stride) {
    return takes_packs(base, stride.batch | stride.head | stride.row, args.dtype);
  };
  return takes_packs(nullptr, args.head_dim, args.dtype) && rows(args.grad, args.grad_stride) &&
         rows(args.query, args.query_stride) && rows(args.key, args.key_stride) &&
         rows(args.value, args.value_stride) && rows(args.grad_query, args.out_stride) &&
         rows(args.grad_key, args.out_stride) && rows(args.grad_value, args.out_stride);
}

template <typename T, int kLanes, int kSize, int kChunks>
cudaError_t launch_lanes(const CrossViewAttentionBackwardArgs& args, cudaStream_t stream) {
  constexpr int kGroups = kThreads / kLanes;
  const int64_t sequences = args.batch * args.length * args.heads;
  if (sequences > UINT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(backward_kernel<T, kLanes, kSize, kChunks>, (sequences + kGroups - 1) / kGroups, kThreads,
                kGroups * 2 * args.views * args.views * sizeof(float), stream, args, static_cast<uint32_t>(sequences));
}

template <typename T>
cudaError_t launch_for(const CrossViewAttentionBackwardArgs& args, cudaStream_t stream) {
  constexpr int kSize = kPackSize<T>;
  const int64_t packs = args.head_dim / kSize;
  if (all_take_packs(args) && packs <= kWarp) {
    // More lanes than a row needs where the shared memory of as many groups would go beyond 48 KB.
    if (packs <= 8 && args.views <= 19) return launch_lanes<T, 8, kSize, 1>(args, stream);
    if (packs <= 16 && args.views <= 27) return launch_lanes<T, 16, kSize, 1>(args, stream);
    return launch_lanes<T, kWarp, kSize, 1>(args, stream);
  }
  return with_chunks(args.head_dim,
                     [&](auto chunks) { return launch_lanes<T, kWarp, 1, decltype(chunks)::value>(args, stream); });
}

}  // namespace
}  // namespace cuda

cudaError_t cross_view_attention_backward_cuda(const CrossViewAttentionBackwardArgs& args, cudaStream_t stream) {
  using namespace cuda;
  return with_element_type(args.dtype, [&](auto element) { return launch_for<decltype(element)>(args, stream); });
}

}  // namespace gafext
