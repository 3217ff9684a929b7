// 3x3 convolution by Winograd's algorithm F(4x4, 3x3): Lavin and Gray, arXiv 1509.09308.
//
// A tile of 4x4 outputs needs 6x6 inputs; both, and the weights, are transformed to 36 numbers, and the convolution
// becomes 36 matrix products over the channels: 36 multiplications for 144. Per superblock of tiles:
//
//   inputs   V = B^T d B, a vector of channels at a time                  [tile blocks, depths, 36, tiles, kDepth]
//   for each unit (a block of tiles, kColumns output channels), kDepth input channels at a time:
//     weights  transposed, U = G g G^T                                    [36, kDepth, kColumns], in the L2 cache
//     product  M += V U in register tiles                                 [36, tiles, kColumns], in the L2 cache
//   outputs  Y = A^T M A, plus the bias
//
// Weights are read in their plain layout, and transformed once per tile block: 20 operations per weight, where a block
// of 96 tiles spends 96 * 4 on it. So nothing is packed at load, and the only memory is scratch.
//
// The interpolation points are 0, +-5/8, +-3/2 and infinity. With the usual 0, +-1, +-2 the error is twice as large;
// with these it is that of oneDNN's direct convolution in channels-last memory, and three times that of its blocked
// one: 1e-5 at most for results of unit scale.
#include "../ops/conv3x3.h"

#include "gemm.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int kOut = 4, kIn = 6, kPoints = kIn * kIn;
constexpr int64_t kTaps = 9;
constexpr int64_t kDepth = 32;                      // input channels of a slice
constexpr int64_t kColumns = 64;                    // output channels of a unit
constexpr int64_t kFewTiles = 24;                   // of a block, below which transforming the weights shows
constexpr int64_t kInputFloats = int64_t{6} << 20;  // of V at a time, or one block: 24 MB

// Floats from point to point of U: 36 stores a whole number of pages apart would share a cache set.
constexpr int64_t kPointStride = kDepth * kColumns + kLanes;

constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

// One dimension of B^T d.
GAFEXT_INLINE void transform_input(const Vec (&d)[kIn], Vec (&v)[kIn]) {
  const Vec even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
  const Vec even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
  v[0] = (kA2 * kB2) * d[0] - (kA2 + kB2) * d[2] + d[4];
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = (kA2 * kB2) * d[1] - (kA2 + kB2) * d[3] + d[5];
}

// One dimension of G g.
GAFEXT_INLINE void transform_weight(Vec g0, Vec g1, Vec g2, Vec (&u)[kIn]) {
  constexpr float at_a = 1.0f / (2 * kA2 * (kA2 - kB2)), at_b = 1.0f / (2 * kB2 * (kB2 - kA2));
  const Vec even_a = at_a * g0 + (at_a * kA2) * g2, odd_a = (at_a * kA) * g1;
  const Vec even_b = at_b * g0 + (at_b * kB2) * g2, odd_b = (at_b * kB) * g1;
  u[0] = (1.0f / (kA2 * kB2)) * g0;
  u[1] = even_a + odd_a;
  u[2] = even_a - odd_a;
  u[3] = even_b + odd_b;
  u[4] = even_b - odd_b;
  u[5] = g2;
}

// One dimension of A^T m.
GAFEXT_INLINE void transform_output(const Vec (&m)[kIn], Vec (&y)[kOut]) {
  const Vec even_a = m[1] + m[2], odd_a = kA * (m[1] - m[2]), even_b = m[3] + m[4], odd_b = kB * (m[3] - m[4]);
  y[0] = m[0] + even_a + even_b;
  y[1] = odd_a + odd_b;
  y[2] = kA2 * even_a + kB2 * even_b;
  y[3] = kA2 * odd_a + kB2 * odd_b + m[5];
}

// How a problem is cut into tiles, blocks of tiles and superblocks.
struct Plan {
  int64_t tiles_y, tiles_x, tiles;      // of an image, and of all
  int64_t block;                        // tiles of a block
  int64_t superblock;                   // blocks that are transformed at a time
  int64_t depths, columns;              // slices of the input channels, units of the output channels
  int64_t input_floats, thread_floats;  // scratch

  explicit Plan(const Conv3x3Args& args) {
    tiles_y = ceil_div(args.height, kOut);
    tiles_x = ceil_div(args.width, kOut);
    tiles = args.batch * tiles_y * tiles_x;
    depths = ceil_div(args.in_channels, kDepth);
    columns = ceil_div(args.out_channels, kColumns);
    // M and U in three quarters of the L2 cache: 132 tiles in 2 MiB were 10 % faster than 96. Fewer where threads would
    // be left without a unit.
    const int64_t cache_floats = l2_bytes() / 4 * 3 / 4;
    int64_t most = max_of(kFewTiles, (cache_floats - kPoints * kPointStride) / (kPoints * kColumns));
    while (most >= 2 * kFewTiles && ceil_div(tiles, most) * columns < 4 * max_threads()) most /= 2;
    block = round_up(ceil_div(tiles, ceil_div(tiles, most)), kTileRows);
    const int64_t block_floats = depths * kPoints * block * kDepth;
    superblock = max_of(1, min_of(ceil_div(tiles, block), kInputFloats / block_floats));
    input_floats = superblock * block_floats;
    thread_floats = kPoints * (kPointStride + block * kColumns) + kDepth * kTaps * kColumns;
  }
};

// One thread's memory.
struct Scratch {
  float* weight;    // [kPoints, kColumns / kPanel, kDepth, kPanel]
  float* products;  // [kPoints, block, kColumns]
  float* taps;      // [kDepth, kTaps, kColumns]

  Scratch(const Plan& plan, float* memory) {
    weight = memory;
    products = weight + kPoints * kPointStride;
    taps = products + kPoints * plan.block * kColumns;
  }
};

// The transformed input of one tile: to[depth, point, 0, :], where a depth has plan.block tiles.
void transform_tile(const Conv3x3Args& args, const Plan& plan, int64_t tile, float* to) {
  const int64_t image = tile / (plan.tiles_y * plan.tiles_x);
  const int64_t y = tile / plan.tiles_x % plan.tiles_y * kOut - 1, x = tile % plan.tiles_x * kOut - 1;
  const float* from = args.x + image * args.x_stride.image + y * args.x_stride.row + x * args.x_stride.column;
  const bool inside = y >= 0 && x >= 0 && y + kIn <= args.height && x + kIn <= args.width;
  for (int64_t c = 0; c < args.in_channels; c += kLanes) {
    const int64_t lanes = min_of(kLanes, args.in_channels - c);
    Vec columns[kIn][kIn];
    for (int j = 0; j < kIn; ++j) {
      Vec d[kIn], v[kIn];
      GAFEXT_UNROLL
      for (int i = 0; i < kIn; ++i) {
        const float* at = from + i * args.x_stride.row + j * args.x_stride.column + c;
        const bool there = inside || (y + i >= 0 && y + i < args.height && x + j >= 0 && x + j < args.width);
        d[i] = !there ? Vec{} : lanes == kLanes ? load(at) : load_first(at, lanes);
      }
      transform_input(d, v);
      GAFEXT_UNROLL
      for (int i = 0; i < kIn; ++i) columns[i][j] = v[i];
    }
    float* point = to + (c / kDepth * kPoints * plan.block) * kDepth + c % kDepth;
    for (int i = 0; i < kIn; ++i) {
      Vec v[kIn];
      transform_input(columns[i], v);
      GAFEXT_UNROLL
      for (int j = 0; j < kIn; ++j) store(point + (i * kIn + j) * plan.block * kDepth, v[j]);
    }
  }
}

// The transformed weights of input channels [channel, channel + depth) and output channels [column, column + count).
void transform_weights(const Conv3x3Args& args, int64_t channel, int64_t depth, int64_t column, int64_t count,
                       const Scratch& scratch) {
  const int64_t row = args.in_channels * kTaps;  // of one output channel
  for (int64_t c = 0; c < kColumns; c += kLanes) {
    transpose_rows(scratch.taps + c, kColumns, args.weight + (column + c) * row + channel * kTaps, row,
                   max_of(0, min_of(kLanes, count - c)), depth * kTaps);
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      const float* taps = scratch.taps + k * kTaps * kColumns + c;
      Vec rows[3][kIn];
      GAFEXT_UNROLL
      for (int i = 0; i < 3; ++i) {
        transform_weight(load(taps + (3 * i) * kColumns), load(taps + (3 * i + 1) * kColumns),
                         load(taps + (3 * i + 2) * kColumns), rows[i]);
      }
      float* to = scratch.weight + c / kPanel * kDepth * kPanel + k * kPanel + c % kPanel;
      GAFEXT_UNROLL
      for (int j = 0; j < kIn; ++j) {
        Vec u[kIn];
        transform_weight(rows[0][j], rows[1][j], rows[2][j], u);
        GAFEXT_UNROLL
        for (int i = 0; i < kIn; ++i) store(to + (i * kIn + j) * kPointStride, u[i]);
      }
    }
  }
}

// products (+)= the 36 matrix products of one slice. `next` are the weights of the slice after it.
void multiply_slice(const Plan& plan, const float* input, int64_t tiles, int64_t depth, bool first, Prefetcher next,
                    const Scratch& scratch) {
  for (int64_t point = 0; point < kPoints; ++point) {
    for (int64_t panel = 0; panel < kColumns; panel += kPanel) {
      const float* weight = scratch.weight + point * kPointStride + panel * kDepth;
      for (int64_t tile = 0; tile < tiles; tile += kTileRows) {
        next.fetch();
        multiply_rows(min_of(kTileRows, tiles - tile), input + (point * plan.block + tile) * kDepth, kDepth, weight,
                      depth, scratch.products + (point * plan.block + tile) * kColumns + panel, kColumns, !first);
      }
    }
  }
}

// Output channels [column, column + count) of tile `tile`, whose products lie at row `row` of the block.
void write_tile(const Conv3x3Args& args, const Plan& plan, int64_t tile, int64_t row, int64_t column, int64_t count,
                const Scratch& scratch) {
  const int64_t image = tile / (plan.tiles_y * plan.tiles_x);
  const int64_t y = tile / plan.tiles_x % plan.tiles_y * kOut, x = tile % plan.tiles_x * kOut;
  const int64_t rows = min_of(kOut, args.height - y), columns = min_of(kOut, args.width - x);
  float* out = args.out + ((image * args.height + y) * args.width + x) * args.out_channels + column;
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t lanes = min_of(kLanes, count - c);
    const Vec bias = args.bias != nullptr ? load_first(args.bias + column + c, lanes) : Vec{};
    Vec half[kOut][kIn];
    for (int j = 0; j < kIn; ++j) {
      Vec m[kIn], y_column[kOut];
      GAFEXT_UNROLL
      for (int i = 0; i < kIn; ++i) {
        m[i] = load(scratch.products + ((i * kIn + j) * plan.block + row) * kColumns + c);
      }
      transform_output(m, y_column);
      GAFEXT_UNROLL
      for (int i = 0; i < kOut; ++i) half[i][j] = y_column[i];
    }
    for (int64_t i = 0; i < rows; ++i) {
      Vec pixels[kOut];
      transform_output(half[i], pixels);
      for (int64_t j = 0; j < columns; ++j) {
        float* to = out + (i * args.width + j) * args.out_channels + c;
        lanes == kLanes ? store(to, pixels[j] + bias) : store_first(to, pixels[j] + bias, lanes);
      }
    }
  }
}

// One unit: `tiles` tiles from `first` on, output channels from `column` on.
void convolve(const Conv3x3Args& args, const Plan& plan, const float* input, int64_t first, int64_t tiles,
              int64_t column, const Scratch& scratch) {
  const int64_t count = min_of(kColumns, args.out_channels - column);
  const int64_t calls = kPoints * (kColumns / kPanel) * ceil_div(tiles, kTileRows);
  for (int64_t channel = 0; channel < args.in_channels; channel += kDepth) {
    const int64_t depth = min_of(kDepth, args.in_channels - channel), after = channel + depth;
    transform_weights(args, channel, depth, column, count, scratch);
    const Prefetcher next(args.weight + (column * args.in_channels + after) * kTaps,
                          args.in_channels * kTaps * sizeof(float), count,
                          min_of(kDepth, args.in_channels - after) * kTaps * sizeof(float), calls);
    multiply_slice(plan, input + channel * kPoints * plan.block, tiles, depth, channel == 0, next, scratch);
  }
  for (int64_t tile = 0; tile < tiles; ++tile) write_tile(args, plan, first + tile, tile, column, count, scratch);
}

}  // namespace

void conv3x3(const Conv3x3Args& args) {
  if (args.batch * args.height * args.width * args.out_channels == 0) return;
  const Plan plan(args);
  float* input = scratch(plan.input_floats + max_threads() * plan.thread_floats);
  float* memory = input + plan.input_floats;
  const int64_t block_floats = plan.input_floats / plan.superblock;

  for (int64_t first = 0; first < plan.tiles; first += plan.superblock * plan.block) {
    const int64_t tiles = min_of(plan.superblock * plan.block, plan.tiles - first);
    parallel_for(tiles, [&](int64_t, int64_t tile) {
      float* to = input + tile / plan.block * block_floats + tile % plan.block * kDepth;
      transform_tile(args, plan, first + tile, to);
    });
    parallel_for(ceil_div(tiles, plan.block) * plan.columns, [&](int64_t thread, int64_t unit) {
      const int64_t block = unit / plan.columns, begin = block * plan.block;
      convolve(args, plan, input + block * block_floats, first + begin, min_of(plan.block, tiles - begin),
               unit % plan.columns * kColumns, Scratch(plan, memory + thread * plan.thread_floats));
    });
  }
}

}  // namespace gafext::GAFEXT_ISA
