// Whether rounding a picture and its weights to 16-bit integers (conv3x3_words.h) adds less than bfloat16 is off by.
//
// Rounding adds up to 8e-4 of |V| |U|, the norms over a slice of a tile's point and of an output channel's. The result
// is smaller than that by more than usual where
//
//   pixels    of a tile differ much in size: the results beside quiet ones get the digits of the loud ones
//   channels  that are loud have small weights for an output channel, which then gets their digits
//
// so both are compared, picture by picture, and for every output channel. Networks' activations pass; a picture that
// does not is convolved in float32. What is not looked at is filters that cancel most of what they read.
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
    pixels_ = scratch(rows_ * (channels_ + args.width) + (args.batch + 1) * (taps_ + slices_));
    sums_ = pixels_ + rows_ * args.width;
    energies_ = sums_ + rows_ * channels_;
    of_taps_ = energies_ + (args.batch + 1) * slices_;
    parallel_for(rows_, [&](int64_t, int64_t row) { square_row(row); });
    parallel_for(args.batch, [&](int64_t, int64_t image) {
      if (sum_rows(image) && pixels_are_even(image)) __atomic_fetch_or(&even_, bit(image), __ATOMIC_RELAXED);
    });
    least_of_all();
    // First against the least of all pictures, which takes one look at the weights: mostly it is enough.
    if (even_ != 0 && !channels_are_even(args.batch)) {
      for (int64_t image = 0; image < args.batch; ++image) {
        if ((*this)(image) && !channels_are_even(image)) even_ &= ~bit(image);
      }
    }
  }

  bool operator()(int64_t image) const { return (even_ & bit(image)) != 0; }

 private:
  static constexpr int64_t kSlice = 64;    // channels
  static constexpr int64_t kOutputs = 16;  // channels that a thread compares at a time

  // A quiet result's 9 pixels have at least this part of the squares of the tile's 36, which is 1/4 where all are
  // alike: a loud pixel of 6 times the others' size passes, and its neighbours' errors are then 1.4 times PyTorch's.
  static constexpr float kLeastPart = 1.0f / 8;
  // Of the squares of |V| |U|, of those of the result, which is 1 where channels are alike. With both at their limits
  // errors are twice PyTorch's.
  static constexpr float kMostSquares = 2.0f;
  // Of a picture: below and above, squares of float32 have too few digits.
  static constexpr float kLeastEnergy = 1e-20f, kMostEnergy = 1e30f;

  static constexpr int kChains = 4;        // of sums
  static constexpr int64_t kAhead = 1024;  // numbers of the weight that are prefetched ahead

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

  // The squares of a picture's channels, a slice's summing up to its number of channels, once for each tap. False if
  // the picture is too large or too small for them; NaN is.
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

  // In the place of one more picture, shares of the slices: with none of the pictures is the result's less.
  void least_of_all() const {
    float* const least = of_taps_ + args_.batch * taps_;
    for (int64_t slice = 0; slice < slices_; ++slice) energies_[args_.batch * slices_ + slice] = 1.0f;
    for (int64_t i = 0; i < taps_; ++i) least[i] = 0.0f;
    bool is_first = true;
    for (int64_t image = 0; image < args_.batch; ++image) {
      if (!(*this)(image)) continue;
      for (int64_t i = 0; i < args_.in_channels * kTaps; ++i) {
        const float mean = energies_[image * slices_ + i / kTaps / kSlice];
        const float share = mean > 0.0f ? of_taps_[image * taps_ + i] / mean : 1.0f;
        least[i] = is_first || share < least[i] ? share : least[i];
      }
      is_first = false;
    }
  }

  // Of every output channel.
  bool channels_are_even(int64_t image) const {
    bool all = true;
    parallel_for(ceil_div(args_.out_channels, kOutputs), [&](int64_t, int64_t unit) {
      const int64_t end = min_of(args_.out_channels, (unit + 1) * kOutputs);
      for (int64_t output = unit * kOutputs; output < end; ++output) {
        if (!output_is_even(image, output)) __atomic_store_n(&all, false, __ATOMIC_RELAXED);
      }
    });
    return all;
  }

  bool output_is_even(int64_t image, int64_t output) const {
    const float *of_taps = of_taps_ + image * taps_, *energies = energies_ + image * slices_;
    alignas(64) BFloat16 gathered[kSlice * kTaps];
    float result = 0.0f, bound = 0.0f;
    for (int64_t slice = 0; slice < slices_; ++slice) {
      const int64_t channel = slice * kSlice, count = min_of(kSlice, args_.in_channels - channel) * kTaps;
      const BFloat16* taps = weight(channel, output);
      if (args_.is_gradient) taps = gather(channel, output, count, gathered);
      Vec of_result[kChains] = {}, of_weight[kChains] = {};
      int64_t i = 0;
      for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
        __builtin_prefetch(taps + i + kAhead), __builtin_prefetch(taps + i + kAhead + 32);
        GAFEXT_UNROLL
        for (int chain = 0; chain < kChains; ++chain) {
          const int64_t at = i + chain * kLanes;
          const Vec w = load(taps + at), square = w * w;
          of_weight[chain] += square;
          of_result[chain] += square * load(of_taps + channel * kTaps + at);
        }
      }
      for (; i < count; i += kLanes) {
        const Vec w = load_up_to(taps + i, count - i), square = w * w;
        of_weight[0] += square;
        of_result[0] += square * load_up_to(of_taps + channel * kTaps + i, count - i);
      }
      static_assert(kChains == 4);
      result += sum_in((of_result[0] + of_result[1]) + (of_result[2] + of_result[3]));
      bound += sum_in((of_weight[0] + of_weight[1]) + (of_weight[2] + of_weight[3])) * energies[slice];
    }
    return bound <= kMostSquares * result;
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
  float* energies_;                // [pictures and one more, slices]: of a channel, on average
  float* of_taps_;                 // [pictures and one more, taps]
  uint64_t even_ = 0;              // a bit for each picture
};

}  // namespace
}  // namespace gafext::GAFEXT_ISA
