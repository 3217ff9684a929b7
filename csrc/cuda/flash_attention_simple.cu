// Attention with an online softmax over tiles of 32 keys (arXiv 2205.14135, algorithm 1). The simple kernel, for
// float32 and what the tensor-core kernels do not serve: every head_dim up to 256, every stride, any card since Volta.
//
// Mapping   A block of 8 warps takes 8 query rows of one (batch, head), one row per warp, in tiles of 32 keys: all
//           warps put the key tile into shared memory; lane j scores key j; maximum and sum go over the warp; then a
//           lane holds the columns lane, lane + 32, ... of the output and each value row is read coalesced.
// Shared    8 query rows and 32 key rows as float32: (8 + 32) * (head_dim | 1) * 4 bytes, 41 KB at 256. The odd row
//           length keeps lanes that walk down different rows on different banks.
// FLOPs     4 Lq Lk D per head: 1.3 GFLOP at (Lq, Lk, D, heads) = (1024, 1024, 64, 5), in float32 FMAs, one
//           shared-memory load each: bound by shared memory at about an eighth of the FMA rate, 8 TFLOP/s on an H100.
// Bytes     Q and O once; K and V once per 8 query rows, from L2: 2 Lk D * Lq / 8 elements per head.
#include "flash_attention.cuh"
#include "softmax.cuh"

namespace gafext::cuda {
namespace {

constexpr int kRows = 8;  // query rows, and warps, of a block
constexpr int kKeys = kWarp;

template <typename T, int kChunks>
__global__ void flash_attention_kernel(const FlashAttentionArgs args, int64_t row_blocks) {
  float* shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const int64_t dim = args.head_dim, pitch = dim | 1;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* my_query = shared + warp * pitch;  // [dim]
  float* keys = shared + kRows * pitch;     // [kKeys, pitch]

  const int64_t first_row = blockIdx.x % row_blocks * kRows, row = first_row + warp;
  const int64_t head = blockIdx.x / row_blocks % args.heads, batch = blockIdx.x / row_blocks / args.heads;
  const bool has_row = row < args.query_length;  // a warp without one still helps to load keys
  if (has_row) {
    const T* query = row_of<T>(args.query, args.query_stride, batch, head, row);
    for (int64_t d = lane; d < dim; d += kWarp) my_query[d] = static_cast<float>(query[d]) * (args.scale * kLog2E);
  }

  float acc[kChunks] = {};
  float max = -INFINITY, sum = 0.0f;
  int64_t end = args.key_length;  // of the keys that any row of the block sees
  if (args.is_causal) end = min(end, first_row + kRows);
  for (int64_t first = 0; first < end; first += kKeys) {
    __syncthreads();  // the previous tile has been read
    for (int64_t i = threadIdx.x; i < kKeys * dim; i += blockDim.x) {
      const int64_t j = i / dim, d = i % dim;
      const bool inside = first + j < args.key_length;
      keys[j * pitch + d] =
          inside ? static_cast<float>(row_of<T>(args.key, args.key_stride, batch, head, first + j)[d]) : 0.0f;
    }
    __syncthreads();
    if (!has_row) continue;

    float score = 0.0f;
    for (int64_t d = 0; d < dim; ++d) score += my_query[d] * keys[lane * pitch + d];
    const int64_t j = first + lane;
    if (j >= args.key_length || (args.is_causal && j > row)) score = -INFINITY;

    const float new_max = fmaxf(max, warp_max(score));
    const float reference = finite_reference(new_max);
    const float weight = exp2f(score - reference), alpha = exp2f(max - reference);
    sum = alpha * sum + warp_sum(weight);
    max = new_max;

    for (int c = 0; c < kChunks; ++c) acc[c] *= alpha;
    int64_t count = min(static_cast<int64_t>(kKeys), args.key_length - first);
    if (args.is_causal) count = min(count, row + 1 - first);
    for (int k = 0; k < count; ++k) {
      const float w = __shfl_sync(kAllLanes, weight, k);
      const T* value = row_of<T>(args.value, args.value_stride, batch, head, first + k);
      for (int c = 0; c < kChunks; ++c) {
        const int64_t d = c * kWarp + lane;
        if (d < dim) acc[c] += w * static_cast<float>(value[d]);
      }
    }
  }

  if (!has_row) return;
  const float inverse = inverse_sum(sum);
  T* out = row_of<T>(args.out, args.out_stride, batch, head, row);
  for (int c = 0; c < kChunks; ++c) {
    const int64_t d = c * kWarp + lane;
    if (d < dim) out[d] = static_cast<T>(acc[c] * inverse);
  }
}

}  // namespace

cudaError_t flash_attention_simple(const FlashAttentionArgs& args, cudaStream_t stream) {
  const int64_t row_blocks = (args.query_length + kRows - 1) / kRows;
  const int64_t blocks = args.batch * args.heads * row_blocks;
  const size_t shared_bytes = (kRows + kKeys) * (args.head_dim | 1) * sizeof(float);
  return with_element_type(args.dtype, [&](auto element) {
    return with_chunks(args.head_dim, [&](auto chunks) {
      return launch(flash_attention_kernel<decltype(element), decltype(chunks)::value>, blocks, kRows * kWarp,
                    shared_bytes, stream, args, row_blocks);
    });
  });
}

}  // namespace gafext::cuda
