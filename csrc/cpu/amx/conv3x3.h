// 3x3 convolution of bfloat16 on AMX tiles, directly: the products of product.h, whose rows are pixels with their eight
// neighbours. bfloat16 has too few digits for Winograd's transforms, and tiles have products enough without them.
//
// What is summed over runs through the taps of 32 channels, then those of the next 32. So the taps of a chunk lie in
// memory next to each other, 576 bytes per output channel, and a step is one tap of 32 channels.
#pragma once

#include "../../ops/conv3x3.h"
#include "picture.h"

#if defined(__AMX_BF16__)
namespace gafext::GAFEXT_ISA {
namespace {

class Conv3x3InBfloat16 : public PictureProduct<BFloat16, Conv3x3Args, kTileDepth> {
 public:
  using Tiles = Bfloat16Tiles;
  using PictureProduct::PictureProduct;

  float* prepare(int64_t floats) {
    float* memory = scratch(picture_.words() + floats);
    const auto load = [&](int64_t image, int64_t y, int64_t x, int64_t group) {
      const int64_t channel = group * kTileDepth;
      return load_pairs_up_to(pixel(image, y, x) + channel, args_.in_channels - channel);
    };
    picture_.fill(reinterpret_cast<uint32_t*>(memory), load, [](int64_t) { return BitVec{}; });
    return memory + picture_.words();
  }

  void arrange(int64_t pair, int64_t chunk, uint32_t* to, int32_t*) const {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = pair * kBlock + half * kTileSide;
      for (int64_t group = groups_.begin(chunk); group < groups_.end(chunk); ++group, to += kTaps * kTileWords) {
        arrange_group(column, group * kTileDepth, to);
      }
    }
  }

  void write(int64_t row, int64_t rows, int64_t pair, const float* sums, const int32_t*) const {
    const int64_t column = pair * kBlock;
    for (int64_t r = row; r < row + rows; ++r, sums += kBlock) {
      const int64_t at = picture_.pixel(r);
      if (at >= 0) write_pixel(at, column, [&](int64_t, int64_t c, int64_t) { return load(sums + c - column); });
    }
  }

 private:
  static constexpr int64_t kGroupWords = kTaps * kTileDepth / 2;  // of an output channel

  // The taps of 32 input channels and 16 output channels as tiles. Transposed, word j of an output channel's taps holds
  // numbers 2 j and 2 j + 1 of [channel, tap]; a word of a tile holds a tap of channels 2 i and 2 i + 1, numbers
  // 18 i + tap and 9 more: the lower half of one word and the upper half of another, or the other way around.
  void arrange_group(int64_t column, int64_t channel, uint32_t* to) const {
    alignas(64) uint32_t words[kGroupWords * kTileSide];
    BFloat16 turned[kTileSide * 2 * kGroupWords];
    const int64_t columns = min_of(kTileSide, args_.out_channels - column);
    const int64_t channels = min_of(kTileDepth, args_.in_channels - channel);
    int64_t stride = args_.in_channels * kTaps;  // from output channel to output channel
    const auto* from = static_cast<const BFloat16*>(args_.weight) + column * stride + channel * kTaps;
    if (args_.is_gradient) from = turn(column, columns, channel, channels, turned), stride = 2 * kGroupWords;
    for (int64_t j = 0; j < kGroupWords; j += kTileSide) {
      Vec lines[kTileSide];
      for (int64_t c = 0; c < kTileSide; ++c) {
        lines[c] =
            bit_cast<Vec>(load_pairs_up_to(from + c * stride + 2 * j, c < columns ? channels * kTaps - 2 * j : 0));
      }
      transpose(lines);
      for (int64_t i = 0; i < kTileSide; ++i) store(reinterpret_cast<float*>(words) + (j + i) * kTileSide, lines[i]);
    }
    constexpr uint32_t kLower = 0xffff;
    for (int64_t tap = 0; tap < kTaps; ++tap, to += kTileWords) {
      for (int64_t i = 0; i < kTileSide; ++i) {
        const uint32_t* first = words + (kTaps * i + tap / 2) * kTileSide;
        const BitVec a = load_bits<BitVec>(first), b = load_bits<BitVec>(first + (tap % 2 == 0 ? 4 : 5) * kTileSide);
        const BitVec pairs[1] = {tap % 2 == 0 ? (a & kLower) | (b & ~kLower) : (a >> 16) | (b << 16)};
        store_terms(to, i, pairs);
      }
    }
  }

  // A gradient's weights, which are [channel, output channel, tap] and have the taps reversed, as [output channel,
  // channel, tap].
  const BFloat16* turn(int64_t column, int64_t columns, int64_t channel, int64_t channels, BFloat16* to) const {
    for (int64_t k = 0; k < channels; ++k) {
      const auto* from =
          static_cast<const BFloat16*>(args_.weight) + ((channel + k) * args_.out_channels + column) * kTaps;
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t tap = 0; tap < kTaps; ++tap) {
          to[c * 2 * kGroupWords + k * kTaps + tap] = from[c * kTaps + kTaps - 1 - tap];
        }
      }
    }
    return to;
  }
};

bool conv3x3_on_tiles(const Conv3x3Args& args) {
  if (args.dtype != DType::kBFloat16 || args.in_channels == 0) return false;
  for_some_pictures<BFloat16>(args, ceil_div(args.in_channels, kTileDepth), [](const Conv3x3Args& part) {
    Conv3x3InBfloat16 problem(part);
    TileProduct(problem).run();
  });
  return true;
}

}  // namespace
}  // namespace gafext::GAFEXT_ISA
#else
namespace gafext::GAFEXT_ISA {
namespace {
bool conv3x3_on_tiles(const Conv3x3Args&) { return false; }
}  // namespace
}  // namespace gafext::GAFEXT_ISA
#endif
