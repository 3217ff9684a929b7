// Attention over the V views of one portrait at each spatial position, in place over the strides.
//
// Mapping   a warp takes one (batch, position, head); blocks of 4 warps. For each of its V query rows: a lane holds the
//           columns lane, lane + 32, ... ; the score with view j is summed over the warp and kept by lane j (V <= 32);
//           softmax goes over the warp; then every lane adds up its columns of the V value rows.
// Shared    none. The V key and value rows are read V times, from the L1 cache after the first: 2 V D elements a warp.
// FLOPs     4 V^2 D a (position, head): 4 KFLOP at V = 4, D = 64.
// Bytes     4 V D elements a (position, head), each read or written once in DRAM: 2 KB in half precision at V = 4,
//           10.5 MB for (V, positions, heads) = (4, 1024, 5): 3 us on an H100. Heads are fastest in the grid, so that
//           neighbouring warps read neighbouring columns of the same rows.
#include "common.cuh"

namespace gafext {
namespace cuda {
namespace {

constexpr int kWarps = 4;  // of a block

template <typename T, int kChunks>
__global__ void cross_view_attention_kernel(const CrossViewAttentionArgs args) {
  const int lane = threadIdx.x % kWarp;
  const int64_t sequence = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (sequence >= args.batch * args.length * args.heads) return;
  const int64_t head = sequence % args.heads, position = sequence / args.heads % args.length;
  const int64_t first_view = sequence / args.heads / args.length * args.views;

  for (int i = 0; i < args.views; ++i) {
    const T* query = row_of<T>(args.query, args.query_stride, first_view + i, head, position);
    float q[kChunks];
    for (int c = 0; c < kChunks; ++c) {
      const int64_t d = c * kWarp + lane;
      q[c] = d < args.head_dim ? to_float(query[d]) * (args.scale * kLog2E) : 0.0f;
    }

    float score = -INFINITY;  // of query view i with view `lane`
    for (int j = 0; j < args.views; ++j) {
      const T* key = row_of<T>(args.key, args.key_stride, first_view + j, head, position);
      float product = 0.0f;
      for (int c = 0; c < kChunks; ++c) {
        const int64_t d = c * kWarp + lane;
        if (d < args.head_dim) product += q[c] * to_float(key[d]);
      }
      product = warp_sum(product);
      if (lane == j) score = product;
    }

    const float max = warp_max(score);
    const float weight = exp2f(score - (max == -INFINITY ? 0.0f : max));  // every score -inf: weights of 0, not NaN
    const float sum = warp_sum(weight);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;

    float acc[kChunks] = {};
    for (int j = 0; j < args.views; ++j) {
      const float w = __shfl_sync(kAllLanes, weight, j) * inverse;
      const T* value = row_of<T>(args.value, args.value_stride, first_view + j, head, position);
      for (int c = 0; c < kChunks; ++c) {
        const int64_t d = c * kWarp + lane;
        if (d < args.head_dim) acc[c] += w * to_float(value[d]);
      }
    }
    T* out = const_cast<T*>(row_of<T>(args.out, args.out_stride, first_view + i, head, position));
    for (int c = 0; c < kChunks; ++c) {
      const int64_t d = c * kWarp + lane;
      if (d < args.head_dim) out[d] = from_float<T>(acc[c]);
    }
  }
}

}  // namespace
}  // namespace cuda

cudaError_t cross_view_attention_cuda(const CrossViewAttentionArgs& args, cudaStream_t stream) {
  using namespace cuda;
  const int64_t blocks = (args.batch * args.length * args.heads + kWarps - 1) / kWarps;
  return with_element_type(args.dtype, [&](auto element) {
    return with_chunks(args.head_dim, [&](auto chunks) {
      return launch(cross_view_attention_kernel<decltype(element), decltype(chunks)::value>, blocks, kWarps * kWarp, 0,
                    stream, args);
    });
  });
}

}  // namespace gafext
