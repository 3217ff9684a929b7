// Attention for long queries on Hopper's own instructions: tiles copied by TMA, products by wgmma, one warp that loads
// and two or three warpgroups that compute. The online softmax is that of arXiv 2205.14135, algorithm 1; the overlap is
// that of FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2.
//
// Mapping   A block, one per multiprocessor, walks over tiles of one head x 64 query rows per consumer; keys in tiles
//           of 128, or 96 where that saves work. Rows beyond the end come as zeros: keys there are masked, queries not
//           stored.
//           Producer, one thread: fills the query buffer of each consumer and rings of key and value buffers; each has
//           a barrier `full` (bytes have arrived) and `empty` (every warp of the consumers has read it).
//           Consumer, a warpgroup, 64 rows: S = Q K^T over shared memory, softmax in registers, O += P V with P in
//           registers. It starts the scores of tile j before the values of tile j - 1, so that the tensor cores have
//           P V to do while the softmax of tile j runs (within the warpgroup); and consumers start their products
//           in turn, so that one's softmax falls on the others' products (between warpgroups).
// Shared    Queries 64 D per consumer, K and V 128 D each per stage, two bytes per element: of 227 KB, head 64 takes
//           112 (three consumers: 120) with 3 stages, head 80 140 with 3, head 128 160 with 2.
// Registers 24 (producer) and 240, or 32 and 160 for three consumers: S takes 64, P 32, O D / 2.
// FLOPs     4 Lq Lk D per head. 64 rows and 128 keys are 4 * 64 * 128 * D on the tensor cores, 4096 per cycle: 512
//           cycles at D = 64; and 8192 exponentials, 16 per cycle: 512 cycles more, which is why they have to overlap.
// Bytes     Q and O once; K and V once per 128 (192) rows, from L2: at D = 64 32 KB in 1024 cycles or more.
//
// Not measured on a GPU yet: tile sizes and stages are FlashAttention-3's or arithmetic, and so are the limits in
// serves_sm90. By the compiler: no spills, no product serialized; 480 instructions per warp for 16 rows x 128 keys at
// D = 64, of which 64 are exponentials, 8 cycles each.
#include "flash_attention_sm90.cuh"

namespace gafext {
namespace cuda {
namespace sm90 {

constexpr int64_t kMinQueries = 512, kMinKeys = 192;  // shorter ones: flash_attention.cu, whose tiles are smaller

template <typename S>
__device__ void produce(SharedMemory<S>& shared, const TensorMap& query, const TensorMap& key, const TensorMap& value,
                        const Problem& problem) {
  Ring<1> queries;
  Ring<S::kStages> keys, values;
  for (int tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const Work<S> work(problem, tile);
    for (int consumer = 0; consumer < S::kConsumers; ++consumer) {
      barrier_wait(shared.query_empty[consumer], queries.parity ^ 1);
      copy_tile_async(shared.query[consumer], query, shared.query_full[consumer], kGroupRows,
                      work.first_row + consumer * kGroupRows, work);
    }
    queries.advance();
    for (int j = 0; j <= work.key_tiles; ++j) {  // in the order in which they are needed
      if (j < work.key_tiles) {
        barrier_wait(shared.key_empty[keys.stage], keys.parity ^ 1);
        copy_tile_async(shared.key[keys.stage], key, shared.key_full[keys.stage], S::kKeys, j * S::kKeys, work);
        keys.advance();
      }
      if (j > 0) {
        barrier_wait(shared.value_empty[values.stage], values.parity ^ 1);
        copy_tile_async(shared.value[values.stage], value, shared.value_full[values.stage], S::kKeys,
                        (j - 1) * S::kKeys, work);
        values.advance();
      }
    }
  }
}

template <typename S, typename T>
__device__ inline void start_scores(float (&scores)[S::kKeys / 2], const unsigned char* query,
                                    const unsigned char* key) {
  products_begin(scores);
#pragma unroll
  for (int k = 0; k < S::kHead / kDepth; ++k) {
    product(scores, columns_descriptor<S>(query, kGroupRows, k), columns_descriptor<S>(key, S::kKeys, k), k > 0, T());
  }
  products_commit();
}

template <typename S, typename T>
__device__ inline void start_values(float (&out)[S::kHead / 2], uint32_t (&weights)[S::kKeys / 4],
                                    const unsigned char* value, bool accumulate) {
  products_begin(out, weights);
#pragma unroll
  for (int k = 0; k < S::kKeys / kDepth; ++k) {
    product(out, weights + 4 * k, rows_descriptor<S>(value, k), accumulate || k > 0, T());
  }
  products_commit();
}

// Consumers start products in turn: the turn of consumer i is numbered barrier 1 + i, where the one before it arrives.
template <typename S>
__device__ inline void await_turn(int consumer) {
  numbered_barrier_wait(1 + consumer, 2 * kGroup);
}
template <typename S>
__device__ inline void pass_turn(int consumer) {
  numbered_barrier_arrive(1 + (consumer + 1) % S::kConsumers, 2 * kGroup);
}

// By lane 0 of each warp, once the products that read the buffer are complete.
__device__ inline void release(Barrier& empty) {
  if (threadIdx.x % kWarp == 0) barrier_arrive(empty);
}

template <typename S, typename T>
__device__ void consume(SharedMemory<S>& shared, const Problem& problem, int consumer) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x % kGroup / kWarp;
  const int warp_row = consumer * kGroupRows + 16 * warp;  // of the tile
  Ring<1> queries;
  Ring<S::kStages> keys, values;
  float scores[S::kKeys / 2], out[S::kHead / 2];
  uint32_t weights[S::kKeys / 4];
  if (consumer == S::kConsumers - 1) pass_turn<S>(consumer);  // the first turn

  for (int tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const Work<S> work(problem, tile);
    const int first_row = work.first_row + warp_row, row = first_row + lane / 4;
    const auto visible = [&](int i) { return problem.is_causal ? min(problem.key_length, i + 1) : problem.key_length; };
    const int all_visible = visible(first_row), limit[2] = {visible(row), visible(row + 8)};
    Rows rows;
    float alpha[2];

    barrier_wait(shared.query_full[consumer], queries.parity);
    barrier_wait(shared.key_full[keys.stage], keys.parity);
    start_scores<S, T>(scores, shared.query[consumer], shared.key[keys.stage]);
    products_wait<0>(scores);
    release(shared.key_empty[keys.stage]);
    keys.advance();
    if (S::kKeys > all_visible) mask_scores(scores, limit, 0);
    scores_to_weights(scores, rows, alpha, problem.scale);
    pack_weights<T>(weights, scores);

    for (int j = 1; j < work.key_tiles; ++j) {
      barrier_wait(shared.key_full[keys.stage], keys.parity);
      await_turn<S>(consumer);
      start_scores<S, T>(scores, shared.query[consumer], shared.key[keys.stage]);
      barrier_wait(shared.value_full[values.stage], values.parity);
      start_values<S, T>(out, weights, shared.value[values.stage], j > 1);
      pass_turn<S>(consumer);
      products_wait<1>(scores);
      release(shared.key_empty[keys.stage]);
      keys.advance();
      if ((j + 1) * S::kKeys > all_visible) mask_scores(scores, limit, j * S::kKeys);
      scores_to_weights(scores, rows, alpha, problem.scale);
      products_wait<0>(out, weights);
      release(shared.value_empty[values.stage]);
      values.advance();
      scale_rows(out, alpha);
      pack_weights<T>(weights, scores);
    }
    release(shared.query_empty[consumer]);
    queries.advance();

    barrier_wait(shared.value_full[values.stage], values.parity);
    start_values<S, T>(out, weights, shared.value[values.stage], work.key_tiles > 1);
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) inverse[h] = inverse_sum(quad_sum(rows.sum[h]));
    products_wait<0>(out, weights);
    release(shared.value_empty[values.stage]);
    values.advance();
    scale_rows(out, inverse);
    store<S, T>(out, problem, work, row);
  }
  if (consumer == 0) await_turn<S>(consumer);  // the last turn, which nobody else awaits
}

template <typename S, typename T>
__global__ void __launch_bounds__(S::kThreads, 1)
    flash_attention_sm90_kernel(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                                const __grid_constant__ TensorMap value, const Problem problem) {
  SharedMemory<S>& shared = *reinterpret_cast<SharedMemory<S>*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    if (shared_address(&shared) % alignof(SharedMemory<S>)) __trap();  // swizzles would not be what they seem
    prefetch_tensor_map(query);
    prefetch_tensor_map(key);
    prefetch_tensor_map(value);
    for (int i = 0; i < S::kConsumers; ++i) {
      barrier_init(shared.query_full[i], 1);
      barrier_init(shared.query_empty[i], kGroup / kWarp);
    }
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(shared.key_full[i], 1);
      barrier_init(shared.value_full[i], 1);
      barrier_init(shared.key_empty[i], S::kConsumers * kGroup / kWarp);
      barrier_init(shared.value_empty[i], S::kConsumers * kGroup / kWarp);
    }
    barriers_visible();
  }
  __syncthreads();
  // The same for a whole warp; the shuffle lets the compiler know.
  const int group = __shfl_sync(kAllLanes, threadIdx.x / kGroup, 0);
  if (group == 0) {
    registers_release<S::kProducerRegisters>();
    if (threadIdx.x == 0) produce<S>(shared, query, key, value, problem);
  } else {
    registers_take<S::kConsumerRegisters>();
    consume<S, T>(shared, problem, group - 1);
  }
}

// Bytes from row to row, head to head, batch to batch; of a dimension of size 1 any valid number.
inline cudaError_t encode(TensorMap& map, const void* base, const HeadStrides& stride, const FlashAttentionArgs& args,
                          int64_t length, int panel_columns, int panel_rows) {
  const int64_t row = length > 1 ? stride.row : args.head_dim;
  const uint64_t extents[4] = {static_cast<uint64_t>(args.head_dim), static_cast<uint64_t>(length),
                               static_cast<uint64_t>(args.heads), static_cast<uint64_t>(args.batch)};
  const uint64_t strides[3] = {static_cast<uint64_t>(row * kElementBytes),
                               static_cast<uint64_t>((args.heads > 1 ? stride.head : row) * kElementBytes),
                               static_cast<uint64_t>((args.batch > 1 ? stride.batch : row) * kElementBytes)};
  return encode_tensor_map(map, base, args.dtype == DType::kBFloat16, extents, strides, panel_columns, panel_rows);
}

template <typename S, typename T>
cudaError_t launch_shape(const FlashAttentionArgs& args, int multiprocessors, cudaStream_t stream) {
  TensorMap query, key, value;
  cudaError_t error = encode(query, args.query, args.query_stride, args, args.query_length, S::kPanel, kGroupRows);
  if (error == cudaSuccess) error = encode(key, args.key, args.key_stride, args, args.key_length, S::kPanel, S::kKeys);
  if (error == cudaSuccess) {
    error = encode(value, args.value, args.value_stride, args, args.key_length, S::kPanel, S::kKeys);
  }
  if (error != cudaSuccess) return error;
  const int64_t row_tiles = (args.query_length + S::kRows - 1) / S::kRows;
  const int64_t tiles = args.batch * args.heads * row_tiles;
  Problem problem{args.out, args.out_stride};
  problem.heads = static_cast<int>(args.heads), problem.is_causal = args.is_causal;
  problem.query_length = static_cast<int>(args.query_length), problem.key_length = static_cast<int>(args.key_length);
  problem.row_tiles = static_cast<int>(row_tiles), problem.tiles = static_cast<int>(tiles);
  problem.scale = base_2_scale(args.scale);
  return launch(flash_attention_sm90_kernel<S, T>, tiles < multiprocessors ? tiles : multiprocessors, S::kThreads,
                sizeof(SharedMemory<S>), stream, query, key, value, problem);
}

// Tiles of 96 keys where they save an eighth of the work and more: 77 and 257 keys take 96 and 288, not 128 and 384.
inline bool fits_96(int64_t keys) { return (keys + 95) / 96 * 96 * 8 <= (keys + 127) / 128 * 128 * 7; }

template <int kHead, typename T>
cudaError_t launch_head(const FlashAttentionArgs& args, int multiprocessors, cudaStream_t stream) {
  if (fits_96(args.key_length)) return launch_shape<Shape<kHead, 2, 96>, T>(args, multiprocessors, stream);
  if constexpr (kHead == 64) {
    // Three consumers keep the tensor cores busier, but 192 rows a tile may need more rounds of the whole card.
    const auto rounds_of_rows = [&](int64_t rows) {
      const int64_t tiles = (args.query_length + rows - 1) / rows * args.batch * args.heads;
      return (tiles + multiprocessors - 1) / multiprocessors * rows;
    };
    if (rounds_of_rows(192) <= rounds_of_rows(128)) {
      return launch_shape<Shape<kHead, 3, 128>, T>(args, multiprocessors, stream);
    }
  }
  return launch_shape<Shape<kHead, 2, 128>, T>(args, multiprocessors, stream);
}

template <typename T>
cudaError_t launch_element(const FlashAttentionArgs& args, cudaStream_t stream) {
  int multiprocessors = 0;
  const cudaError_t error = device_attribute(multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess) return error;
  switch (args.head_dim) {
    case 64:
      return launch_head<64, T>(args, multiprocessors, stream);
    case 80:
      return launch_head<80, T>(args, multiprocessors, stream);
    case 128:
      return launch_head<128, T>(args, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

// What a tensor map and 16-byte stores ask of a tensor.
inline bool is_aligned(const void* base, const HeadStrides& stride, int64_t batch, int64_t heads, int64_t length) {
  const auto fits = [](int64_t extent, int64_t elements) {
    return extent == 1 || (elements > 0 && elements % 8 == 0 && elements < int64_t{1} << 39);
  };
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && fits(length, stride.row) && fits(heads, stride.head) &&
         fits(batch, stride.batch);
}

inline bool can_run(const FlashAttentionArgs& args) {
  const auto fits = [](int64_t extent) { return extent > 0 && extent < int64_t{1} << 24; };
  return args.dtype != DType::kFloat32 && (args.head_dim == 64 || args.head_dim == 80 || args.head_dim == 128) &&
         fits(args.query_length) && fits(args.key_length) && fits(args.heads) && fits(args.batch) &&
         args.batch * args.heads * (args.query_length / 128 + 1) < int64_t{1} << 30 && args.scale > 0.0f &&
         is_aligned(args.query, args.query_stride, args.batch, args.heads, args.query_length) &&
         is_aligned(args.key, args.key_stride, args.batch, args.heads, args.key_length) &&
         is_aligned(args.value, args.value_stride, args.batch, args.heads, args.key_length) &&
         is_aligned(args.out, args.out_stride, args.batch, args.heads, args.query_length);
}

}  // namespace sm90
}  // namespace cuda

bool serves_sm90(const FlashAttentionArgs& args) {
  using namespace cuda::sm90;
  int multiprocessors = 0;
  if (!can_run(args)) return false;
  if (cuda::device_attribute(multiprocessors, cudaDevAttrMultiProcessorCount) != cudaSuccess) return false;
  // With fewer tiles the smaller ones of flash_attention.cu, and its split keys, reach more of the card.
  const bool fills_half = 2 * args.batch * args.heads * ((args.query_length + 127) / 128) >= multiprocessors;
  return fills_half && args.query_length >= kMinQueries && args.key_length >= kMinKeys;
}

cudaError_t flash_attention_sm90(const FlashAttentionArgs& args, cudaStream_t stream) {
  using namespace cuda;
  if (!sm90::can_run(args)) return cudaErrorInvalidValue;
  if (args.dtype == DType::kFloat16) return sm90::launch_element<__half>(args, stream);
  return sm90::launch_element<__nv_bfloat16>(args, stream);
}

}  // namespace gafext
