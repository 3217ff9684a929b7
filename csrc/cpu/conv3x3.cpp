// 3x3 convolution by Winograd's algorithm F(4x4, 3x3): Lavin and Gray, arXiv 1509.09308.
//
// A tile of 4x4 outputs needs 6x6 inputs; both, and the weights, are transformed to 36 numbers, and the convolution
// becomes 36 matrix products over the channels: 36 multiplications for 144. Per superblock of tiles:
//
//   inputs   V = B^T d B, a vector of channels at a time                  [tile blocks, depths, 36, tiles, kDepth]
//   for each unit (a block of tiles, kColumns output channels), kDepth input channels at a time:
//     weights  transposed, U = G g G^T                                    [36, kDepth, kColumns], in the L2 cache
//     product  M += V U in register tiles                                 [36, tiles, kColumns], see Plan for its size
//   outputs  Y = A^T M A, plus the bias and what there is to add
//
// Weights are read in their plain layout, and transformed once per tile block: 20 operations per weight, where a block
// of 132 tiles spends 132 * 4 on it. So nothing is packed at load, and the only memory is scratch.
#include "../ops/conv3x3.h"

#include "amx/conv3x3.h"
#include "conv3x3_evenness.h"
#include "conv3x3_words.h"
#include "pictures.h"

namespace gafext::GAFEXT_ISA {
namespace {

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
template <typename T>
void transform_tile(const Conv3x3Args& args, const Plan& plan, int64_t tile, float* to) {
  const Tile<T> from(args, plan, tile);
  for (int64_t c = 0; c < args.in_channels; c += kLanes) {
    Vec columns[kIn][kIn];
    transform_columns(args, from, c, columns);
    float* point = to + (c / kDepth * kPoints * plan.block) * kDepth + c % kDepth;
    for (int i = 0; i < kIn; ++i) {
      Vec v[kIn];
      transform_input(columns[i], v);
      GAFEXT_UNROLL
      for (int j = 0; j < kIn; ++j) store(point + (i * kIn + j) * plan.block * kDepth, v[j]);
    }
  }
}

// From one channel to the next of the weight's first dimension.
int64_t weight_row(const Conv3x3Args& args) {
  return (args.is_gradient ? args.out_channels : args.in_channels) * kTaps;
}

// The taps of input channel `channel` and output channel `column`.
template <typename T>
const T* first_weight(const Conv3x3Args& args, int64_t channel, int64_t column) {
  const int64_t first = args.is_gradient ? channel : column, second = args.is_gradient ? column : channel;
  return static_cast<const T*>(args.weight) + first * weight_row(args) + second * kTaps;
}

// The transformed weights of input channels [channel, channel + depth) and output channels [column, column + count).
template <typename T>
void transform_weights(const Conv3x3Args& args, int64_t channel, int64_t depth, int64_t column, int64_t count,
                       const Scratch& scratch) {
  const T* weight = first_weight<T>(args, channel, column);
  const int64_t row = weight_row(args);
  for (int64_t c = 0; c < round_up(count, kPanel / 2); c += kLanes) {
    const int64_t lanes = max_of(0, min_of(kLanes, count - c));
    if (!args.is_gradient) {
      transpose_rows(scratch.taps + c, kColumns, weight + c * row, row, lanes, depth * kTaps);
      continue;
    }
    for (int64_t k = 0; k < depth; ++k) {
      transpose_rows(scratch.taps + k * kTaps * kColumns + c, kColumns, weight + k * row + c * kTaps, kTaps, lanes,
                     kTaps);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t c = 0; c < round_up(count, kPanel / 2); c += kLanes) {
      const float* taps = scratch.taps + (k * kTaps + (args.is_gradient ? kTaps - 1 : 0)) * kColumns + c;
      const int64_t next = args.is_gradient ? -kColumns : kColumns;  // from tap to tap
      Vec rows[3][kIn];
      GAFEXT_UNROLL
      for (int i = 0; i < 3; ++i) {
        transform_weight(load(taps + (3 * i) * next), load(taps + (3 * i + 1) * next), load(taps + (3 * i + 2) * next),
                         rows[i]);
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
// Half of the vectors where `count` output channels need no more.
void multiply_slice(const Plan& plan, const float* input, int64_t tiles, int64_t depth, int64_t count, bool first,
                    Prefetcher next, const Scratch& scratch) {
  for (int64_t point = 0; point < kPoints; ++point) {
    for (int64_t panel = 0; panel < count; panel += kPanel) {
      const float* weight = scratch.weight + point * kPointStride + panel * kDepth;
      const auto multiply =
          count - panel <= kPanel / 2 ? multiply_rows<kTileVectors / 2, float> : multiply_rows<kTileVectors, float>;
      for (int64_t tile = 0; tile < tiles; tile += kTileRows) {
        next.fetch();
        multiply(min_of(kTileRows, tiles - tile), input + (point * plan.block + tile) * kDepth, kDepth, weight, depth,
                 scratch.products + (point * plan.block + tile) * kColumns + panel, kColumns, !first);
      }
    }
  }
}

// One unit: `tiles` tiles from `first` on, output channels from `column` on.
template <typename T>
void convolve(const Conv3x3Args& args, const Plan& plan, const float* input, int64_t first, int64_t tiles,
              int64_t column, const Scratch& scratch) {
  const int64_t count = min_of(kColumns, args.out_channels - column);
  const int64_t calls = kPoints * ceil_div(count, kPanel) * ceil_div(tiles, kTileRows);
  for (int64_t channel = 0; channel < args.in_channels; channel += kDepth) {
    const int64_t depth = min_of(kDepth, args.in_channels - channel), after = channel + depth;
    transform_weights<T>(args, channel, depth, column, count, scratch);
    const int64_t coming = min_of(kDepth, args.in_channels - after);
    const Prefetcher next(first_weight<T>(args, after, column), weight_row(args) * sizeof(T),
                          args.is_gradient ? coming : count, (args.is_gradient ? count : coming) * kTaps * sizeof(T),
                          calls);
    multiply_slice(plan, input + channel * kPoints * plan.block, tiles, depth, count, channel == 0, next, scratch);
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    write_tile<T>(args, plan, first + tile, scratch.products + tile * kColumns, column, count);
  }
}

template <typename T>
void convolve_all(const Conv3x3Args& args) {
  const Plan plan(args, kDepth);
  float* input = scratch(plan.input_floats + max_threads() * plan.thread_floats);
  float* memory = input + plan.input_floats;
  const int64_t block_floats = plan.input_floats / plan.superblock;

  for (int64_t first = 0; first < plan.tiles; first += plan.superblock * plan.block) {
    const int64_t tiles = min_of(plan.superblock * plan.block, plan.tiles - first);
    parallel_for(tiles, [&](int64_t, int64_t tile) {
      float* to = input + tile / plan.block * block_floats + tile % plan.block * kDepth;
      transform_tile<T>(args, plan, first + tile, to);
    });
    parallel_for(ceil_div(tiles, plan.block) * plan.columns, [&](int64_t thread, int64_t unit) {
      const int64_t block = unit / plan.columns, begin = block * plan.block;
      convolve<T>(args, plan, input + block * block_floats, first + begin, min_of(plan.block, tiles - begin),
                  unit % plan.columns * kColumns, Scratch(plan, memory + thread * plan.thread_floats));
    });
  }
}

// By products of 16-bit integers, which are twice as fast as float32's, what they do not take the digits of. False where
// they do not pay.
bool convolve_words(const Conv3x3Args& args) {
  constexpr int64_t kFewChannels = 128, kMostPictures = 64;
  const bool is_wide = args.in_channels >= kFewChannels && args.out_channels >= kFewChannels;
  const bool is_one_tile =
      args.height <= kOut && args.width <= kOut;  // for which looking at the weights takes too long
  if (args.dtype != DType::kBFloat16 || !is_wide || is_one_tile || !has_vnni()) return false;
  for (int64_t first = 0; first < args.batch; first += kMostPictures) {
    const Conv3x3Args some = pictures_of<BFloat16>(args, first, min_of(kMostPictures, args.batch - first));
    const Evenness is_even(some);
    for (int64_t image = 0, end; image < some.batch; image = end) {
      for (end = image + 1; end < some.batch && is_even(end) == is_even(image);) ++end;
      const Conv3x3Args part = pictures_of<BFloat16>(some, image, end - image);
      const auto* weight = static_cast<const BFloat16*>(args.weight);
      if (is_even(image)) {
        WordConvolution<Conv3x3Args, BFloat16, BFloat16>(part, weight, nullptr, args.is_gradient).run();
      } else {
        convolve_all<BFloat16>(part);
      }
    }
  }
  return true;
}

}  // namespace

void conv3x3(const Conv3x3Args& args) {
  if (args.batch * args.height * args.width * args.out_channels == 0) return;
  if (conv3x3_on_tiles(args) || convolve_words(args)) return;
  with_element_type(args.dtype, [&](auto element) { convolve_all<decltype(element)>(args); });
}

}  // namespace gafext::GAFEXT_ISA
