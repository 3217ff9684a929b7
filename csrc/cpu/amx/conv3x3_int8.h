// 3x3 convolution with 8-bit weights on AMX tiles, directly: the products of product.h, whose rows are pixels with their
// eight neighbours. What is summed over runs through the taps of 64 channels, then those of the next 64: so the pixels of
// a chunk stay in the L1 cache for all of their taps (by taps first, a pass over the channels each, twice the time).
//
// A picture is rounded with one scale, to q = round(x / s) + z of 0..255, which s = (hi - lo) / 255 and z = round(-lo / s)
// map its range to, zero included: what SiLU leaves is hardly negative, and signed numbers would waste half of theirs.
// Pixels outside of the picture are z. So
//
//   sum w x = s (sum w q - z sum w)
//
// exactly but for the rounding of x. The sums of the weights are added up as their tiles are arranged.
#pragma once

#include "../../ops/conv3x3_int8.h"
#include "../integers.h"
#include "picture.h"

#if defined(__AMX_INT8__)
namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kByteChannels = 64;  // of a group

template <typename T>
class Conv3x3InInt8 : public PictureProduct<T, Conv3x3Int8Args, kByteChannels> {
  using Base = PictureProduct<T, Conv3x3Int8Args, kByteChannels>;
  using Base::args_, Base::groups_, Base::picture_, Base::kTaps, Base::pixel;

 public:
  using Tiles = UnsignedTiles;
  using Base::Base, Base::steps;

  float* prepare(int64_t floats) {
    const int64_t lines = args_.batch * args_.height;
    const int64_t small = round_up(3 * args_.batch + 2 * lines, kTileSide);  // tiles cross no cache line
    float* memory = scratch(picture_.words() + small + floats);
    rounding_ = reinterpret_cast<Rounding*>(memory + picture_.words());
    auto* ranges = reinterpret_cast<Range*>(rounding_ + args_.batch);
    parallel_for(lines, [&](int64_t, int64_t line) { ranges[line] = range_of(line); });
    for (int64_t image = 0; image < args_.batch; ++image) {
      Range whole;
      for (int64_t y = 0; y < args_.height; ++y) whole.add(ranges[image * args_.height + y]);
      rounding_[image] = Rounding(whole);
    }
    picture_.fill(
        reinterpret_cast<uint32_t*>(memory),
        [&](int64_t image, int64_t y, int64_t x, int64_t group) { return rounded(image, y, x, group * kByteChannels); },
        [&](int64_t image) { return rounding_[image].zero * 0x01010101u - BitVec{}; });
    return memory + picture_.words() + small;
  }

  void arrange(int64_t pair, int64_t chunk, uint32_t* to, int32_t* column_sums) const {
    for (int64_t half = 0; half < 2; ++half, column_sums += kTileSide) {
      const int64_t column = pair * kBlock + half * kTileSide;
      const int64_t row = kTaps * args_.in_channels;
      IntVec total = chunk == 0 ? IntVec{} : load_bits<IntVec>(column_sums);
      for (int64_t step = 0; step < steps(chunk); ++step, to += kTileWords) {
        const int64_t channel = (groups_.begin(chunk) + step / kTaps) * kByteChannels;
        const int8_t* from = args_.weight + column * row + step % kTaps * args_.in_channels + channel;
        Vec lines[kTileSide];
        for (int64_t c = 0; c < kTileSide; ++c) {
          const int64_t count = column + c < args_.out_channels ? args_.in_channels - channel : 0;
          lines[c] = bit_cast<Vec>(load_bytes_up_to<QuadVec>(from + c * row, count));
        }
        transpose(lines);
        for (int64_t i = 0; i < kTileSide; ++i) {
          store(reinterpret_cast<float*>(to) + i * kTileSide, lines[i]);
          add_products<Products::kQuadsVnni>(total, 0x01010101 - IntVec{}, bit_cast<IntVec>(lines[i]));
        }
      }
      __builtin_memcpy(column_sums, &total, sizeof(total));
    }
  }

  void write(int64_t row, int64_t rows, int64_t pair, const int32_t* sums, const int32_t* column_sums) const {
    const int64_t column = pair * kBlock;
    for (int64_t r = row; r < row + rows; ++r, sums += kBlock) {
      const int64_t at = picture_.pixel(r);
      if (at < 0) continue;
      Base::write_pixel(at, column, [&](int64_t image, int64_t c, int64_t count) {
        const Rounding rounding = rounding_[image];
        const IntVec sum =
            load_bits<IntVec>(sums + c - column) - rounding.zero * load_bits<IntVec>(column_sums + c - column);
        return __builtin_convertvector(sum, Vec) * (rounding.scale * load_up_to(args_.scale + c, count));
      });
    }
  }

 private:
  // Of numbers and zero; NaN or infinite where one of them is.
  struct Range {
    float low = 0.0f, high = 0.0f;

    void add(Range other) {
      low = other.low < low || other.low != other.low ? other.low : low;
      high = other.high > high ? other.high : high;
    }
  };

  struct Rounding {
    float scale, factor;
    int32_t zero;

    explicit Rounding(Range range) {
      const float width = range.high - range.low;
      const bool finite = width < kInfinity;  // false of NaN
      const float step = finite ? width / 255.0f : 0.0f, usable = step < 0x1p-126f ? 0x1p-126f : step;
      scale = finite ? usable : __builtin_nanf("");
      factor = finite ? 1.0f / usable : 0.0f;
      zero = finite ? static_cast<int32_t>(0.5f - range.low * factor) : 0;
    }
  };

  // Of line `line` of all pictures.
  Range range_of(int64_t line) const {
    Vec low{}, high{};
    IntVec most{};  // of the magnitudes, as integers: NaN is above infinity
    for (int64_t x = 0; x < args_.width; ++x) {
      const T* from = pixel(line / args_.height, line % args_.height, x);
      for (int64_t c = 0; c < args_.in_channels; c += kLanes) {
        const Vec v = load_up_to(from + c, args_.in_channels - c);
        const IntVec magnitude = bit_cast<IntVec>(v) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
        low = v < low ? v : low, high = v > high ? v : high;
      }
    }
    Range range;
    for (int lane = 0; lane < kLanes; ++lane) {
      range.add({low[lane], high[lane]});
      if (most[lane] > 0x7f800000) range.low = __builtin_nanf("");
    }
    return range;
  }

  BitVec rounded(int64_t image, int64_t y, int64_t x, int64_t channel) const {
    const Rounding rounding = rounding_[image];
    const T* from = pixel(image, y, x) + channel;
    uint8_t bytes[kByteChannels];
    for (int64_t c = 0; c < kByteChannels; c += kLanes) {
      typedef uint8_t Numbers __attribute__((vector_size(kLanes)));
      const IntVec q =
          round_to_int(load_up_to(from + c, args_.in_channels - channel - c) * rounding.factor) + rounding.zero;
      const IntVec clamped = q > 255 ? 255 - IntVec{} : q < 0 ? IntVec{} : q;
      const Numbers numbers = __builtin_convertvector(clamped, Numbers);
      __builtin_memcpy(bytes + c, &numbers, sizeof(numbers));
    }
    return load_bits<BitVec>(bytes);
  }

  Rounding* rounding_ = nullptr;  // [batch]
};

}  // namespace
}  // namespace gafext::GAFEXT_ISA
#endif
