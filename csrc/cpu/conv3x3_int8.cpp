// 3x3 convolution with 8-bit weights: conv3x3.cpp's algorithm, with products of 16-bit integers.
//
// The transforms are computed in float32, and U and V rounded to integers of at most kLimit:
//
//   U = kLimit (G g G^T) / (127 |G|_p)      V = kLimit (B^T d B) / (max|d| |B|_p)
//
// where |G|_p and |B|_p, constants of a point p, are the largest that the transforms make of 1, and max|d| is that of
// a tile. Products of a slice of kChannels channels then fit 32 bits. Sums of slices are float32.
//
// A word holds the channels c and c + kLanes, so that vectors of channels need no shuffle. With AMX,
// amx/conv3x3_int8.h convolves directly.
#include "../ops/conv3x3_int8.h"

#include "amx/conv3x3_int8.h"
#include "conv3x3_winograd.h"
#include "integers.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kChannels = 2 * kDepth;       // of a slice
constexpr int64_t kGroup = 2 * kLanes;          // channels of a vector of words
constexpr float kLimit = 5768.0f;               // kChannels kLimit^2 128 / 127 < 2^31: a weight may be -128
constexpr float kTiny = 1e-30f, kHuge = 1e36f;  // of max|d|: below it is zero; above, the transforms would overflow

// The largest that one dimension of B^T d and of G g make of numbers up to 1.
constexpr float kInputNorm[kIn] = {kA2 * kB2 + kA2 + kB2 + 1, (1 + kB2) * (1 + kA), (1 + kB2) * (1 + kA),
                                   (1 + kA2) * (1 + kB),      (1 + kA2) * (1 + kB), kA2 * kB2 + kA2 + kB2 + 1};
constexpr float kNormAtA = (1 + kA + kA2) / (2 * kA2 * (kB2 - kA2)),
                kNormAtB = (1 + kB + kB2) / (2 * kB2 * (kB2 - kA2));
constexpr float kWeightNorm[kIn] = {1 / (kA2 * kB2), kNormAtA, kNormAtA, kNormAtB, kNormAtB, 1};

// One thread's memory.
struct Scratch {
  uint32_t* weight;  // [kPoints, kColumns / kPanel, kDepth, kPanel]
  float* products;   // [kPoints, block, kColumns]
  float* taps;       // [kDepth, kTaps, kColumns]

  Scratch(const Plan& plan, float* memory) {
    weight = reinterpret_cast<uint32_t*>(memory);
    products = memory + kPoints * kPointStride;
    taps = products + kPoints * plan.block * kColumns;
  }
};

// Words of the 16-bit integers nearest to factor * low and factor * high.
GAFEXT_INLINE BitVec words_of(Vec low, Vec high, Vec factor) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the integer is in the lowest bits of the sum
  return (bit_cast<BitVec>(low * factor + kShift) & 0xffff) | (bit_cast<BitVec>(high * factor + kShift) << 16);
}

template <typename T>
struct Tile {
  const T* from;
  int64_t y, x;
  bool inside;

  Tile(const Conv3x3Int8Args& args, const Plan& plan, int64_t tile) {
    const int64_t image = tile / (plan.tiles_y * plan.tiles_x);
    y = tile / plan.tiles_x % plan.tiles_y * kOut - 1, x = tile % plan.tiles_x * kOut - 1;
    from =
        static_cast<const T*>(args.x) + image * args.x_stride.image + y * args.x_stride.row + x * args.x_stride.column;
    inside = y >= 0 && x >= 0 && y + kIn <= args.height && x + kIn <= args.width;
  }
};

// max|d| of the tile's inputs; NaN where one is not finite, or too large for the transforms.
template <typename T>
float largest_of(const Conv3x3Int8Args& args, const Tile<T>& tile) {
  IntVec most[4] = {};
  for (int64_t i = max_of(0, -tile.y); i < min_of(kIn, args.height - tile.y); ++i) {
    for (int64_t j = max_of(0, -tile.x); j < min_of(kIn, args.width - tile.x); ++j) {
      const T* at = tile.from + i * args.x_stride.row + j * args.x_stride.column;
      int64_t c = 0;
      for (; c + 4 * kLanes <= args.in_channels; c += 4 * kLanes) {
        GAFEXT_UNROLL
        for (int v = 0; v < 4; ++v) {
          const IntVec bits = bit_cast<IntVec>(load(at + c + v * kLanes)) & 0x7fffffff;
          most[v] = bits > most[v] ? bits : most[v];
        }
      }
      for (; c < args.in_channels; c += kLanes) {
        const IntVec bits = bit_cast<IntVec>(load_first(at + c, min_of(kLanes, args.in_channels - c))) & 0x7fffffff;
        most[0] = bits > most[0] ? bits : most[0];
      }
    }
  }
  GAFEXT_UNROLL
  for (int v = 1; v < 4; ++v) most[0] = most[v] > most[0] ? most[v] : most[0];
  int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits = most[0][lane] > bits ? most[0][lane] : bits;
  return bits < bit_cast<int32_t>(kHuge) ? bit_cast<float>(bits) : __builtin_nanf("");
}

template <typename T>
GAFEXT_INLINE void transform(const Conv3x3Int8Args& args, const Tile<T>& tile, int64_t channel, Vec (&v)[kIn][kIn]) {
  const int64_t lanes = max_of(0, min_of(kLanes, args.in_channels - channel));
  Vec columns[kIn][kIn];
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
  for (int i = 0; i < kIn; ++i) transform_input(columns[i], v[i]);
}

// The transformed input of one tile: to[depth, point, 0, :], where a depth has plan.block tiles. Returns max|d|.
template <typename T>
float transform_tile(const Conv3x3Int8Args& args, const Plan& plan, int64_t number, uint32_t* to) {
  const Tile<T> tile(args, plan, number);
  const float largest = largest_of(args, tile), factor = largest > kTiny ? kLimit / largest : 0.0f;
  for (int64_t c = 0; c < args.in_channels; c += kGroup) {
    Vec low[kIn][kIn], high[kIn][kIn];
    transform(args, tile, c, low);
    transform(args, tile, c + kLanes, high);
    uint32_t* point = to + c / kChannels * kPoints * plan.block * kDepth + c % kChannels / 2;
    for (int i = 0; i < kIn; ++i) {
      GAFEXT_UNROLL
      for (int j = 0; j < kIn; ++j) {
        const float norm = 1 / (kInputNorm[i] * kInputNorm[j]);
        const BitVec words = words_of(low[i][j], high[i][j], broadcast(norm * factor));
        __builtin_memcpy(point + (i * kIn + j) * plan.block * kDepth, &words, sizeof(words));
      }
    }
  }
  return largest;
}

// The transformed weights of `depth` <= kDepth input channels from `channel` on, words `word`... of the slice, and of
// output channels [column, column + count).
void transform_weights(const Conv3x3Int8Args& args, int64_t channel, int64_t depth, int64_t word, int64_t column,
                       int64_t count, const Scratch& scratch) {
  const int64_t row = args.in_channels * kTaps;  // of one output channel
  for (int64_t c = 0; c < kColumns; c += kLanes) {
    transpose_rows(scratch.taps + c, kColumns, args.weight + (column + c) * row + channel * kTaps, row,
                   max_of(0, min_of(kLanes, count - c)), depth * kTaps);
  }
  const int64_t padded = round_up(depth, kGroup);
  for (float* to = scratch.taps + depth * kTaps * kColumns; to < scratch.taps + padded * kTaps * kColumns; to += kLanes)
    store(to, Vec{});
  for (int64_t k = 0; k < padded / 2; ++k) {
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      Vec rows[2][3][kIn];
      for (int half = 0; half < 2; ++half) {
        const float* taps = scratch.taps + (k / kLanes * kGroup + k % kLanes + half * kLanes) * kTaps * kColumns + c;
        GAFEXT_UNROLL
        for (int i = 0; i < 3; ++i) {
          transform_weight(load(taps + (3 * i) * kColumns), load(taps + (3 * i + 1) * kColumns),
                           load(taps + (3 * i + 2) * kColumns), rows[half][i]);
        }
      }
      uint32_t* to = scratch.weight + c / kPanel * kDepth * kPanel + (word + k) * kPanel + c % kPanel;
      GAFEXT_UNROLL
      for (int j = 0; j < kIn; ++j) {
        Vec low[kIn], high[kIn];
        transform_weight(rows[0][0][j], rows[0][1][j], rows[0][2][j], low);
        transform_weight(rows[1][0][j], rows[1][1][j], rows[1][2][j], high);
        GAFEXT_UNROLL
        for (int i = 0; i < kIn; ++i) {
          constexpr float kFull = kLimit / 127;
          const BitVec words = words_of(low[i], high[i], broadcast(kFull / (kWeightNorm[i] * kWeightNorm[j])));
          __builtin_memcpy(to + (i * kIn + j) * kPointStride, &words, sizeof(words));
        }
      }
    }
  }
}

// c[r, :] = (or +=) sum over `words` of a[r, word] b[word, :], of kTileRows rows and kPanel columns.
template <Products kind>
void multiply_tile(const uint32_t* a, const uint32_t* b, int64_t words, float* c, bool accumulate) {
  IntVec tile[kTileRows][kTileVectors] = {};
  add_words<kind>(a, kDepth, b, words, tile);
  GAFEXT_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    GAFEXT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = c + r * kColumns + v * kLanes;
      const Vec sum = __builtin_convertvector(tile[r][v], Vec);
      store(to, accumulate ? load(to) + sum : sum);
    }
  }
}

// products (+)= the 36 matrix products of one slice. `next` are the weights of the slice after it. Register tiles are
// whole: the rows beyond `tiles` are scratch that nothing reads.
void multiply_slice(const Plan& plan, const uint32_t* input, int64_t tiles, int64_t words, bool first, Prefetcher next,
                    const Scratch& scratch) {
  auto* multiply = multiply_tile<Products::kPairs>;
#if defined(__AVX512F__)
  if (has_vnni()) multiply = multiply_tile<Products::kPairsVnni>;
#endif
  for (int64_t point = 0; point < kPoints; ++point) {
    for (int64_t panel = 0; panel < kColumns; panel += kPanel) {
      const uint32_t* weight = scratch.weight + point * kPointStride + panel * kDepth;
      for (int64_t tile = 0; tile < tiles; tile += kTileRows) {
        next.fetch();
        multiply(input + (point * plan.block + tile) * kDepth, weight, words,
                 scratch.products + (point * plan.block + tile) * kColumns + panel, !first);
      }
    }
  }
}

// Output channels [column, column + count) of tile `tile`, whose products lie at row `row` of the block.
template <typename T>
void write_tile(const Conv3x3Int8Args& args, const Plan& plan, int64_t tile, int64_t row, float largest, int64_t column,
                int64_t count, const Scratch& scratch) {
  const int64_t image = tile / (plan.tiles_y * plan.tiles_x);
  const int64_t y = tile / plan.tiles_x % plan.tiles_y * kOut, x = tile % plan.tiles_x * kOut;
  const int64_t rows = min_of(kOut, args.height - y), columns = min_of(kOut, args.width - x);
  const PixelStrides& stride = args.residual_stride;
  const T* biases = args.bias == nullptr ? nullptr : static_cast<const T*>(args.bias) + image * args.bias_stride;
  const T* residual = static_cast<const T*>(args.residual);
  if (residual != nullptr) residual += image * stride.image + y * stride.row + x * stride.column + column;
  T* out = static_cast<T*>(args.out) + ((image * args.height + y) * args.width + x) * args.out_channels + column;
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t lanes = min_of(kLanes, count - c);
    Vec half[kOut][kIn];
    GAFEXT_UNROLL
    for (int j = 0; j < kIn; ++j) {
      Vec m[kIn], y_half[kOut];
      GAFEXT_UNROLL
      for (int i = 0; i < kIn; ++i) {
        const float norm = kInputNorm[i] * kInputNorm[j] * kWeightNorm[i] * kWeightNorm[j] * (127 / kLimit / kLimit);
        m[i] = norm * load(scratch.products + ((i * kIn + j) * plan.block + row) * kColumns + c);
      }
      transform_output(m, y_half);
      GAFEXT_UNROLL
      for (int i = 0; i < kOut; ++i) half[i][j] = y_half[i];
    }
    const Vec scale = largest * load_first(args.scale + column + c, lanes);
    const Vec bias = biases != nullptr ? load_first(biases + column + c, lanes) : Vec{};
    for (int64_t i = 0; i < rows; ++i) {
      Vec v[kOut];
      transform_output(half[i], v);
      T* to = out + i * args.width * args.out_channels + c;
      for (int64_t j = 0; j < columns; ++j, to += args.out_channels) {
        Vec value = v[j] * scale + bias;
        if (residual != nullptr) {
          const T* from = residual + i * stride.row + j * stride.column + c;
          value += lanes == kLanes ? load(from) : load_first(from, lanes);
        }
        if (lanes == kLanes) {
          store(to, value);
        } else {
          store_first(to, value, lanes);
        }
      }
    }
  }
}

// One unit: `tiles` tiles from `first` on, output channels from `column` on.
template <typename T>
void convolve(const Conv3x3Int8Args& args, const Plan& plan, const uint32_t* input, const float* largest, int64_t first,
              int64_t tiles, int64_t column, const Scratch& scratch) {
  const int64_t count = min_of(kColumns, args.out_channels - column);
  const int64_t calls = kPoints * (kColumns / kPanel) * ceil_div(tiles, kTileRows);
  for (int64_t channel = 0; channel < args.in_channels; channel += kChannels) {
    const int64_t depth = min_of(kChannels, args.in_channels - channel), after = channel + depth;
    for (int64_t c = 0; c < depth; c += kDepth)
      transform_weights(args, channel + c, min_of(kDepth, depth - c), c / 2, column, count, scratch);
    const Prefetcher next(args.weight + (column * args.in_channels + after) * kTaps, args.in_channels * kTaps, count,
                          min_of(kChannels, args.in_channels - after) * kTaps, calls);
    const uint32_t* slice = input + channel / kChannels * kPoints * plan.block * kDepth;
    const int64_t words = round_up(depth, kGroup) / 2;
    multiply_slice(plan, slice, tiles, words, channel == 0, next, scratch);
  }
  for (int64_t tile = 0; tile < tiles; ++tile)
    write_tile<T>(args, plan, first + tile, tile, largest[tile], column, count, scratch);
}

template <typename T>
void convolve_all(const Conv3x3Int8Args& args) {
  const Plan plan(args, kChannels);
  const int64_t most = round_up(plan.superblock * plan.block, kLanes);
  float* input = scratch(plan.input_floats + most + max_threads() * plan.thread_floats);
  float *largest = input + plan.input_floats, *memory = largest + most;
  const int64_t block_floats = plan.input_floats / plan.superblock;

  for (int64_t first = 0; first < plan.tiles; first += plan.superblock * plan.block) {
    const int64_t tiles = min_of(plan.superblock * plan.block, plan.tiles - first);
    parallel_for(tiles, [&](int64_t, int64_t tile) {
      float* to = input + tile / plan.block * block_floats + tile % plan.block * kDepth;
      largest[tile] = transform_tile<T>(args, plan, first + tile, reinterpret_cast<uint32_t*>(to));
    });
    parallel_for(ceil_div(tiles, plan.block) * plan.columns, [&](int64_t thread, int64_t unit) {
      const int64_t block = unit / plan.columns, begin = block * plan.block;
      convolve<T>(args, plan, reinterpret_cast<uint32_t*>(input + block * block_floats), largest + begin, first + begin,
                  min_of(plan.block, tiles - begin), unit % plan.columns * kColumns,
                  Scratch(plan, memory + thread * plan.thread_floats));
    });
  }
}

}  // namespace

void conv3x3_int8(const Conv3x3Int8Args& args) {
  if (args.batch * args.height * args.width * args.out_channels == 0) return;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
#if defined(__AMX_INT8__)
    if (args.taps_first) {
      return for_some_pictures<T>(args, ceil_div(args.in_channels, kByteChannels), [](const auto& part) {
        Conv3x3InInt8<T> problem(part);
        TileProduct(problem).run();
      });
    }
#endif
    convolve_all<T>(args);
  });
}

}  // namespace gafext::GAFEXT_ISA
