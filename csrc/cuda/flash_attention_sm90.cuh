// The parts of flash_attention_sm90.cu: shapes, shared memory, rings of buffers, the work of a block, the softmax of a
// tile, the store. The algorithm and the roles of the warps are described there.
#pragma once

#include "../ops/flash_attention.h"
#include "hopper.cuh"
#include "softmax.cuh"

namespace gafext::cuda::sm90 {

constexpr int kGroup = 128;     // threads of a warpgroup
constexpr int kGroupRows = 64;  // query rows of a consumer: one wgmma's
constexpr int kDepth = 16;      // of a product, in elements
constexpr int kElementBytes = 2;

template <int kHead_, int kConsumers_, int kKeys_>
struct Shape {
  static constexpr int kHead = kHead_, kConsumers = kConsumers_, kKeys = kKeys_;  // keys of a tile
  static constexpr int kRows = kConsumers * kGroupRows;
  static constexpr int kStages = kHead > 80 ? 2 : 3;
  // Panels of 64 columns, 16 where 64 does not divide the head: a product reads whole panels.
  static constexpr int kPanel = kHead % 64 == 0 ? 64 : 16, kPanels = kHead / kPanel;
  static constexpr int kPanelRowBytes = kPanel * kElementBytes;
  static constexpr int kQueryBytes = kGroupRows * kHead * kElementBytes, kKeyBytes = kKeys * kHead * kElementBytes;
  static constexpr int kThreads = (kConsumers + 1) * kGroup;
  // What a multiprocessor's 65536 registers give each thread: (24 + 2 * 240) or (32 + 3 * 160), times 128.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
};

template <typename S>
struct alignas(1024) SharedMemory {
  unsigned char query[S::kConsumers][S::kQueryBytes];
  unsigned char key[S::kStages][S::kKeyBytes], value[S::kStages][S::kKeyBytes];
  Barrier query_full[S::kConsumers], query_empty[S::kConsumers];
  Barrier key_full[S::kStages], key_empty[S::kStages], value_full[S::kStages], value_empty[S::kStages];
};

// The next buffer of a ring: the producer waits for `empty` with !parity, a consumer for `full` with parity.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

struct Problem {
  void* out;
  HeadStrides out_stride;
  int heads, query_length, key_length;
  int row_tiles, tiles;  // of a head; of all heads
  float scale;           // times log2(e)
  bool is_causal;
};

// One tile of query rows. Neighbouring blocks take the tiles of one head, whose keys then come from L2. Causal: the
// tiles with the most keys of every head first, so that the last round is short.
template <typename S>
struct Work {
  int first_row, head, batch, key_tiles;
  __device__ Work(const Problem& problem, int tile) {
    const int sequences = problem.tiles / problem.row_tiles;
    const int row_tile = problem.is_causal ? problem.row_tiles - 1 - tile / sequences : tile % problem.row_tiles;
    const int sequence = problem.is_causal ? tile % sequences : tile / problem.row_tiles;
    first_row = row_tile * S::kRows;
    head = sequence % problem.heads;
    batch = sequence / problem.heads;
    const int keys = problem.is_causal ? min(problem.key_length, first_row + S::kRows) : problem.key_length;
    key_tiles = (keys + S::kKeys - 1) / S::kKeys;
  }
};

// Copies all panels of a tile of rows; the barrier `full` counts their bytes.
template <typename S>
__device__ inline void copy_tile_async(unsigned char* shared, const TensorMap& map, Barrier& full, int rows,
                                       int first_row, const Work<S>& work) {
  barrier_arrive_expect(full, rows * S::kHead * kElementBytes);
  for (int panel = 0; panel < S::kPanels; ++panel) {
    copy_panel_async(shared + panel * rows * S::kPanelRowBytes, map, full, panel * S::kPanel, first_row, work.head,
                     work.batch);
  }
}

// Columns kDepth * k .. of a K-major tile of `rows` rows.
template <typename S>
__device__ inline uint64_t columns_descriptor(const unsigned char* tile, int rows, int k) {
  constexpr int kSteps = S::kPanel / kDepth;  // products of depth kDepth per panel
  const unsigned char* start = tile + k / kSteps * rows * S::kPanelRowBytes + k % kSteps * kDepth * kElementBytes;
  return matrix_descriptor(start, 16, 8 * S::kPanelRowBytes, S::kPanelRowBytes);
}
// Rows kDepth * k .. of the value tile, all columns.
template <typename S>
__device__ inline uint64_t rows_descriptor(const unsigned char* tile, int k) {
  return matrix_descriptor(tile + k * kDepth * S::kPanelRowBytes, S::kKeys * S::kPanelRowBytes, 8 * S::kPanelRowBytes,
                           S::kPanelRowBytes);
}

// The two rows h = 0, 1 of a thread; the four lanes 4 g .. 4 g + 3 share them. `sum` is of the thread's own columns.
struct Rows {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
};

// Scores of keys from `limit[h]` on get no weight; column 0 of the tile is key `first_key`.
template <int N>
__device__ inline void mask_scores(float (&scores)[N], const int (&limit)[2], int first_key) {
  const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (column + i / 4 * 8 + i % 2 >= limit[i / 2 % 2]) scores[i] = -INFINITY;
  }
}

// Scores become weights 2^(scale score - reference), the reference being the running maximum; what was accumulated
// before is to be multiplied by alpha.
template <int N>
__device__ inline void scores_to_weights(float (&scores)[N], Rows& rows, float (&alpha)[2], float scale) {
  float reference[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float max = rows.max[h];
#pragma unroll
    for (int i = 2 * h; i < N; i += 4) max = fmaxf(max, fmaxf(scores[i], scores[i + 1]));
    max = quad_max(max);
    reference[h] = finite_reference(max) * scale;
    alpha[h] = rescale_factor(rows.max[h] * scale, reference[h]);
    rows.max[h] = max;
  }
  float slope = scale;
  if (__any_sync(kAllLanes, fmaxf(fabsf(reference[0]), fabsf(reference[1])) > kHugeReference)) {
    slope = 1.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) scores[i] *= scale;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 2 * h; i < N; i += 4) {
      scores[i] = exp2_approximate(fmaf(scores[i], slope, -reference[h]));
      scores[i + 1] = exp2_approximate(fmaf(scores[i + 1], slope, -reference[h]));
      sum += scores[i] + scores[i + 1];
    }
    rows.sum[h] = rows.sum[h] * alpha[h] + sum;
  }
}

template <typename T, int N>
__device__ inline void pack_weights(uint32_t (&packed)[N / 2], const float (&weights)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) packed[i] = pack_pair(weights[2 * i], weights[2 * i + 1], T());
}

template <int N>
__device__ inline void scale_rows(float (&c)[N], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) c[i] *= factor[i / 2 % 2];
}

// Four lanes exchange: word i of lane t becomes word t of lane i.
__device__ inline void transpose_among_four_lanes(uint32_t (&word)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool is_upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t received = __shfl_xor_sync(kAllLanes, is_upper ? word[i] : word[i + distance], distance);
      word[i] = is_upper ? received : word[i];
      word[i + distance] = is_upper ? word[i + distance] : received;
    }
  }
}

// Writes the accumulators of a tile, 16 bytes at a time: four lanes exchange their pieces of four chunks of a row.
template <typename S, typename T>
__device__ inline void store(const float (&out)[S::kHead / 2], const Problem& problem, const Work<S>& work, int row) {
  constexpr int kChunks = S::kHead / 8;
  const int lane_of_four = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    T* out_row = row_of<T>(problem.out, problem.out_stride, work.batch, work.head, row + 8 * h);
    uint4* target = reinterpret_cast<uint4*>(out_row);
#pragma unroll
    for (int first = 0; first < kChunks; first += 4) {
      uint32_t word[4] = {};
#pragma unroll
      for (int i = 0; i < 4 && first + i < kChunks; ++i) {
        const int c = 4 * (first + i) + 2 * h;
        word[i] = pack_pair(out[c], out[c + 1], T());
      }
      transpose_among_four_lanes(word);
      if (row + 8 * h < problem.query_length && first + lane_of_four < kChunks) {
        target[first + lane_of_four] = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

}  // namespace gafext::cuda::sm90
