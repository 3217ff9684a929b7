// Whether rounding a picture and its weights to 16-bit integers (conv3x3_words.h) adds less than bfloat16 is off by.
//
// Rounding adds up to 8e-4 of |V| |U|, the norms over a slice of a tile's point and of an output channel's. The result
// is smaller than that by more than usual where
//
//   pixels    of a tile differ much in size: the results beside quiet ones get the digits of the loud ones
//   channels  that are loud have small weights for an output channel, which then gets their digits
//
// so both are compared, picture by picture, and for every output channel. In U-Nets of random weights all but one
// picture in fifty pass; one that does not is convolved in float32. What is not looked at is filters that cancel most of
// what they read, and those that read only channels that are quiet in some part of a picture and loud in another, where
// the other channels do the opposite: squares by part of the picture would multiply the cost of compare_channels.
#pragma once

#include "../ops/conv3x3.h"
#include "conv3x3_winograd.h"

namespace gafext::GAFEXT_ISA {
namespace {

class Evenness {
 public:
  // Of at most 64 pictures of bfloat16.
  explicit Evenness(const Conv3x3Args& args)
      : args_(args),
        rows_(args.batch * args.height),
        channels_(round_up(args.in_channels, kLanes)),
        taps_(round_up(args.in_channels * kTaps, kLanes)),
        slices_(ceil_div(args.in_channels, kSlice)) {
    pixels_ = scratch(rows_ * (channels_ + args.width) + round_up(args.batch, kPictures) * (taps_ + slices_));
    sums_ = pixels_ + rows_ * args.width;
    energies_ = sums_ + rows_ * channels_;
    of_taps_ = energies_ + round_up(args.batch, kPictures) * slices_;
    parallel_for(rows_, [&](int64_t, int64_t row) { square_row(row); });
    parallel_for(args.batch, [&](int64_t, int64_t image) {
      if (sum_rows(image) && pixels_are_even(image)) __atomic_fetch_or(&even_, bit(image), __ATOMIC_RELAXED);
    });
    for (int64_t image = 0; image < args.batch; image += kPictures) {
      parallel_for(ceil_div(args.out_channels, kOutputs), [&](int64_t, int64_t unit) {
        const int64_t first = unit * kOutputs;
        compare_channels(image, first, min_of(kOutputs, args.out_channels - first));
      });
    }
  }

  bool operator()(int64_t image) const { return (even_ & bit(image)) != 0; }

 private:
  static constexpr int64_t kSlice = 64;    // channels
  static constexpr int64_t kOutputs = 16;  // channels that a thread compares at a time
  static constexpr int kPictures = 8;      // with a look at the weights

  // A quiet result's 9 pixels have at least this part of the squares of the tile's 36, which is 1/4 where all are
  // alike, and 4/25 in a corner: a loud pixel of 11 times the others' size passes, and errors beside it are then about
  // twice PyTorch's. U-Nets of random weights have 1/23 to 1/10.
  static constexpr float kLeastPart = 1.0f / 18;
  // The squares of |V| |U| over those of the result: 1 where channels are alike, 1.02 to 1.05 in U-Nets of random
  // weights.
  static constexpr float kMostSquares = 1.2f;
  // Of a picture: below and above, squares of float32 have too few digits.
  static constexpr float kLeastEnergy = 1e-20f, kMostEnergy = 1e30f;

  static constexpr int64_t kAhead = 2 * kSlice * kTaps;  // numbers of the weight that are prefetched ahead

  static uint64_t bit(int64_t image) { return uint64_t{1} << image; }

  // The squares of a row of pixels: summed over channels, and over pixels.
  void square_row(int64_t row) const {
    const BFloat16* x = static_cast<const BFloat16*>(args_.x) + row / args_.height * args_.x_stride.image +
                        row % args_.height * args_.x_stride.row;
    float* sums = sums_ + row * channels_;
    for (int64_t c = 0; c < channels_; c += kLanes) store(sums + c, Vec{});
    for (int64_t column = 0; column < args_.width; ++column, x += args_.x_stride.column) {
      Vec of_pixel{};
      for (int64_t c = 0; c < args_.in_channels; c += kLanes) {
        const Vec v = load_up_to(x + c, args_.in_channels - c), square = v * v;
        of_pixel += square;
        store(sums + c, load(sums + c) + square);
      }
      pixels_[row * args_.width + column] = sum_in(of_pixel);
    }
  }

  // The squares of a picture's channels, once for each tap, and the mean of every slice's. False if they are too large
  // or too small for float32, or NaN.
  bool sum_rows(int64_t image) const {
    float* const of_taps = of_taps_ + image * taps_;
    float* const energies = energies_ + image * slices_;
    float all = 0.0f;
    for (int64_t slice = 0; slice < slices_; ++slice) {
      const int64_t begin = slice * kSlice, end = min_of(args_.in_channels, begin + kSlice);
      float energy = 0.0f;
      for (int64_t c = begin; c < end; ++c) {
        float sum = 0.0f;
        for (int64_t y = 0; y < args_.height; ++y) sum += sums_[(image * args_.height + y) * channels_ + c];
        for (int64_t tap = 0; tap < kTaps; ++tap) of_taps[c * kTaps + tap] = sum;
        energy += sum;
      }
      energies[slice] = energy / static_cast<float>(end - begin);
      all += energy;
    }
    for (int64_t i = args_.in_channels * kTaps; i < taps_; ++i) of_taps[i] = 0.0f;
    return all > kLeastEnergy && all < kMostEnergy;
  }

  // Of output channels: the squares of the results, lane by lane, and of |V| |U|.
  struct Squares {
    Vec results[kOutputs][kPictures] = {};
    float bounds[kOutputs][kPictures] = {};
  };

  // Of kPictures pictures from `image` on, those beyond the last being what memory holds, and `count` <= kOutputs output
  // channels from `first` on. A slice's part of the pictures, 18 KB, stays in the L1 cache for all of these.
  void compare_channels(int64_t image, int64_t first, int64_t count) {
    Squares squares;
    for (int64_t slice = 0; slice < slices_; ++slice) {
      int64_t output = 0;
      for (; output + 2 <= count; output += 2) add_slice<2>(image, slice, first, output, squares);
      if (output < count) add_slice<1>(image, slice, first, output, squares);
    }
    for (int p = 0; p < min_of(kPictures, args_.batch - image); ++p) {
      bool is_even = true;
      for (int64_t o = 0; o < count; ++o) {
        is_even = is_even && squares.bounds[o][p] <= kMostSquares * sum_in(squares.results[o][p]);
      }
      if (!is_even) __atomic_fetch_and(&even_, ~bit(image + p), __ATOMIC_RELAXED);
    }
  }

  // Of a slice and `Outputs` output channels from first + output on.
  template <int Outputs>
  void add_slice(int64_t image, int64_t slice, int64_t first, int64_t output, Squares& squares) const {
    alignas(64) BFloat16 gathered[Outputs][kSlice * kTaps];
    const int64_t channel = slice * kSlice, count = min_of(kSlice, args_.in_channels - channel) * kTaps;
    const float* factors = of_taps_ + image * taps_ + channel * kTaps;
    const BFloat16* taps[Outputs];
    Vec of_weight[Outputs] = {}, results[Outputs][kPictures];
    for (int o = 0; o < Outputs; ++o) {
      taps[o] = weight(channel, first + output + o);
      if (args_.is_gradient) taps[o] = gather(channel, first + output + o, count, gathered[o]);
      for (int p = 0; p < kPictures; ++p) results[o][p] = squares.results[output + o][p];
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec square[Outputs];
      GAFEXT_UNROLL
      for (int o = 0; o < Outputs; ++o) {
        __builtin_prefetch(taps[o] + i + kAhead, 0, 2);
        const Vec w = load_up_to(taps[o] + i, count - i);
        square[o] = w * w;
        of_weight[o] += square[o];
      }
      GAFEXT_UNROLL
      for (int p = 0; p < kPictures; ++p) {
        const Vec of_picture = load(factors + p * taps_ + i);
        GAFEXT_UNROLL
        for (int o = 0; o < Outputs; ++o) results[o][p] += square[o] * of_picture;
      }
    }
    for (int o = 0; o < Outputs; ++o) {
      const float sum = sum_in(of_weight[o]);
      for (int p = 0; p < kPictures; ++p) {
        squares.results[output + o][p] = results[o][p];
        squares.bounds[output + o][p] += sum * energies_[(image + p) * slices_ + slice];
      }
    }
  }

  const BFloat16* weight(int64_t channel, int64_t output) const {
    const int64_t at = args_.is_gradient ? channel * args_.out_channels + output : output * args_.in_channels + channel;
    return static_cast<const BFloat16*>(args_.weight) + at * kTaps;
  }

  const BFloat16* gather(int64_t channel, int64_t output, int64_t count, BFloat16* to) const {
    for (int64_t i = 0; i < count; i += kTaps) {
      __builtin_memcpy(to + i, weight(channel + i / kTaps, output), kTaps * sizeof(BFloat16));
    }
    return to;
  }

  float pixel(int64_t image, int64_t y, int64_t x) const {
    const bool there = y >= 0 && y < args_.height && x >= 0 && x < args_.width;
    return there ? pixels_[(image * args_.height + y) * args_.width + x] : 0.0f;
  }

  bool pixels_are_even(int64_t image) const {
    bool all = true;
    for (int64_t y = 0; y < args_.height; y += kOut) {
      for (int64_t x = 0; x < args_.width; x += kOut) all = all && tile_is_even(image, y, x);
    }
    return all;
  }

  // The tile whose results begin at (y, x).
  bool tile_is_even(int64_t image, int64_t y, int64_t x) const {
    float rows[kIn][kOut], of_tile = 0.0f;  // sums of three neighbours in a row
    for (int i = 0; i < kIn; ++i) {
      float pixels[kIn];
      for (int j = 0; j < kIn; ++j) of_tile += pixels[j] = pixel(image, y + i - 1, x + j - 1);
      for (int j = 0; j < kOut; ++j) rows[i][j] = pixels[j] + pixels[j + 1] + pixels[j + 2];
    }
    float least = of_tile;
    for (int i = 0; i < min_of(kOut, args_.height - y); ++i) {
      for (int j = 0; j < min_of(kOut, args_.width - x); ++j) {
        const float part = rows[i][j] + rows[i + 1][j] + rows[i + 2][j];
        least = part < least ? part : least;
      }
    }
    return least >= kLeastPart * of_tile;
  }

  const Conv3x3Args& args_;
  const int64_t rows_, channels_;  // of pixels in all pictures; in whole vectors
  const int64_t taps_, slices_;    // of an output channel, in whole vectors; of the channels
  float* pixels_;                  // [rows, width]
  float* sums_;                    // [rows, channels]
  float* energies_;                // [pictures, slices]: of a channel, on average
  float* of_taps_;                 // [pictures, taps]
  uint64_t even_ = 0;              // a bit for each picture
};

}  // namespace
}  // namespace gafext::GAFEXT_ISA
