// What the 3x3 convolutions by Winograd's F(4x4, 3x3) share: the transforms, and how a problem is cut.
//
// The interpolation points are 0, +-5/8, +-3/2 and infinity. With the usual 0, +-1, +-2 the error is twice as large;
// with these it is that of oneDNN's direct convolution in channels-last memory, and three times that of its blocked
// one: 1e-5 at most for results of unit scale.
#pragma once

#include "gemm.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int kOut = 4, kIn = 6, kPoints = kIn * kIn;
constexpr int64_t kTaps = 9;
constexpr int64_t kDepth = 32;                      // 32-bit numbers of a slice of the input channels
constexpr int64_t kColumns = max_of(32, kPanel);    // output channels of a unit: U is 147 KB, 294 KB with AVX-512
constexpr int64_t kFewTiles = 24;                   // of a block, below which transforming the weights shows
constexpr int64_t kManyTiles = 132;                 // of a block, for which it does not
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

  template <typename Args>
  Plan(const Args& args, int64_t slice_channels, int64_t tile_rows = kTileRows) {
    tiles_y = ceil_div(args.height, kOut);
    tiles_x = ceil_div(args.width, kOut);
    tiles = args.batch * tiles_y * tiles_x;
    depths = ceil_div(args.in_channels, slice_channels);
    columns = ceil_div(args.out_channels, kColumns);
    // M and U in three quarters of the L2 cache: 132 tiles in 2 MiB were 10 % faster than 96 (AVX-512). Where the L3 is
    // close, more than fit: with AVX2 144 were 7 to 12 % faster than 48 in 512 KiB, and on a Zen 4 132 were 4 to 9 % in
    // float32, 8 to 18 % in bfloat16, than 53 in 1 MiB. Fewer where threads would be left without a unit.
    const int64_t cache_floats = l2_bytes() / 4 * 3 / 4, fewest = kLanes < 16 || zen() != 0 ? kManyTiles : kFewTiles;
    int64_t most = max_of(fewest, (cache_floats - kPoints * kPointStride) / (kPoints * kColumns));
    while (most >= 2 * kFewTiles && ceil_div(tiles, most) * columns < 4 * max_threads()) most /= 2;
    block = round_up(ceil_div(tiles, ceil_div(tiles, most)), tile_rows);
    const int64_t block_floats = depths * kPoints * block * kDepth;
    superblock = max_of(1, min_of(ceil_div(tiles, block), kInputFloats / block_floats));
    input_floats = superblock * block_floats;
    thread_floats = kPoints * (kPointStride + block * kColumns) + slice_channels * kTaps * kColumns;
  }
};

// The inputs of a tile, from the pixel (y, x) on, which may be beyond the picture.
template <typename T>
struct Tile {
  const T* from;
  int64_t y, x;
  bool inside;

  template <typename Args>
  Tile(const Args& args, const Plan& plan, int64_t tile) {
    const int64_t image = tile / (plan.tiles_y * plan.tiles_x);
    y = tile / plan.tiles_x % plan.tiles_y * kOut - 1, x = tile % plan.tiles_x * kOut - 1;
    from =
        static_cast<const T*>(args.x) + image * args.x_stride.image + y * args.x_stride.row + x * args.x_stride.column;
    inside = y >= 0 && x >= 0 && y + kIn <= args.height && x + kIn <= args.width;
  }
};

// B^T d of kLanes channels from `channel` on; channels beyond the last are zero.
template <typename T, typename Args>
GAFEXT_INLINE void transform_columns(const Args& args, const Tile<T>& tile, int64_t channel, Vec (&columns)[kIn][kIn]) {
  const int64_t lanes = max_of(0, min_of(kLanes, args.in_channels - channel));
  for (int j = 0; j < kIn; ++j) {
    Vec d[kIn], column[kIn];
    GAFEXT_UNROLL
    for (int i = 0; i < kIn; ++i) {
      const T* at = tile.from + i * args.x_stride.row + j * args.x_stride.column + channel;
      const int64_t y = tile.y + i, x = tile.x + j;
      const bool there = tile.inside || (y >= 0 && y < args.height && x >= 0 && x < args.width);
      d[i] = !there ? Vec{} : lanes == kLanes ? load(at) : load_first(at, lanes);
    }
    transform_input(d, column);
    GAFEXT_UNROLL
    for (int i = 0; i < kIn; ++i) columns[i][j] = column[i];
  }
}

// Output channels [column, column + count) of tile `tile`, whose products are a row of [kPoints, block, kColumns].
template <typename T, typename Args>
void write_tile(const Args& args, const Plan& plan, int64_t tile, const float* products, int64_t column,
                int64_t count) {
  const int64_t image = tile / (plan.tiles_y * plan.tiles_x);
  const int64_t y = tile / plan.tiles_x % plan.tiles_y * kOut, x = tile % plan.tiles_x * kOut;
  const int64_t rows = min_of(kOut, args.height - y), columns = min_of(kOut, args.width - x);
  T* out = static_cast<T*>(args.out) + ((image * args.height + y) * args.width + x) * args.out_channels + column;
  const T* biases = args.bias == nullptr ? nullptr : static_cast<const T*>(args.bias) + image * args.bias_stride;
  const PixelStrides& stride = args.residual_stride;
  const T* residual = static_cast<const T*>(args.residual);
  if (residual != nullptr) residual += image * stride.image + y * stride.row + x * stride.column + column;
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t lanes = min_of(kLanes, count - c);
    const Vec bias = biases != nullptr ? load_first(biases + column + c, lanes) : Vec{};
    Vec half[kOut][kIn];
    for (int j = 0; j < kIn; ++j) {
      Vec m[kIn], y_column[kOut];
      GAFEXT_UNROLL
      for (int i = 0; i < kIn; ++i) {
        m[i] = load(products + (i * kIn + j) * plan.block * kColumns + c);
      }
      transform_output(m, y_column);
      GAFEXT_UNROLL
      for (int i = 0; i < kOut; ++i) half[i][j] = y_column[i];
    }
    for (int64_t i = 0; i < rows; ++i) {
      Vec pixels[kOut];
      transform_output(half[i], pixels);
      for (int64_t j = 0; j < columns; ++j) {
        T* to = out + (i * args.width + j) * args.out_channels + c;
        Vec sum = pixels[j] + bias;
        if (residual != nullptr) {
          const T* from = residual + i * stride.row + j * stride.column + c;
          sum += lanes == kLanes ? load(from) : load_first(from, lanes);
        }
        lanes == kLanes ? store(to, sum) : store_first(to, sum, lanes);
      }
    }
  }
}

}  // namespace
}  // namespace gafext::GAFEXT_ISA
