// Whether rounding a picture and its weights to 16-bit integers (conv3x3_words.h) adds less than bfloat16 is off by.
//
// Rounding adds up to 8e-4 of |V| |U|, the norms over a slice of a tile's point and of an output channel's. The result
// is smaller than that by more than usual where
//
//   pixels    of a tile differ much in size: the results beside quiet ones get the digits of the loud ones
//   channels  that are loud have small weights, and the other way around
//
// so both are compared, picture by picture. Networks' activations pass. One that does not is convolved in float32.
#pragma once

#include "../ops/conv3x3.h"
#include "conv3x3_winograd.h"

namespace gafext::GAFEXT_ISA {
namespace {

class Evenness {
 public:
  // Of at most 64 pictures of bfloat16.
  explicit Evenness(const Conv3x3Args& args)
      : args_(args), rows_(args.batch * args.height), channels_(round_up(args.in_channels, kLanes)) {
    pixels_ = scratch(rows_ * (channels_ + args.width) + channels_);
    sums_ = pixels_ + rows_ * args.width;
    weights_ = sums_ + rows_ * channels_;
    parallel_for(rows_, [&](int64_t, int64_t row) { square_row(row); });
    parallel_for(ceil_div(args.in_channels, kSlice), [&](int64_t, int64_t slice) { square_weights(slice * kSlice); });
    parallel_for(args.batch, [&](int64_t, int64_t image) {
      if (is_even(image)) __atomic_fetch_or(&even_, uint64_t{1} << image, __ATOMIC_RELAXED);
    });
  }

  bool operator()(int64_t image) const { return (even_ >> image & 1) != 0; }

 private:
  static constexpr int64_t kSlice = 64;           // channels
  static constexpr int64_t kSampledOutputs = 16;  // channels of the weight, evenly spread

  // A quiet result's 9 pixels have at least this part of the squares of the tile's 36, which is 1/4 where all are
  // alike: a loud pixel of 10 times the others' size passes, and its neighbours' errors are then 1.8 times PyTorch's.
  static constexpr float kLeastPart = 1.0f / 16;
  // Of the squares of |V| |U|, of those of the result: an error that doubles.
  static constexpr float kMostSquares = 4.0f;
  // Of a picture: below and above, squares of float32 have too few digits.
  static constexpr float kLeastEnergy = 1e-20f, kMostEnergy = 1e30f;

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

  // The squares of the weights of kSlice input channels from `channel` on.
  void square_weights(int64_t channel) const {
    const int64_t end = min_of(args_.in_channels, channel + kSlice), outputs = args_.out_channels;
    const auto* weight = static_cast<const BFloat16*>(args_.weight);
    for (int64_t c = channel; c < end; ++c) weights_[c] = 0.0f;
    for (int64_t i = 0; i < kSampledOutputs; ++i) {
      const int64_t output = i * outputs / kSampledOutputs;
      for (int64_t c = channel; c < end; ++c) {
        const BFloat16* taps =
            weight + (args_.is_gradient ? c * outputs + output : output * args_.in_channels + c) * kTaps;
        for (int64_t tap = 0; tap < kTaps; ++tap) {
          const float w = bit_cast<float>(uint32_t{taps[tap].bits} << 16);
          weights_[c] += w * w;
        }
      }
    }
  }

  bool is_even(int64_t image) const { return channels_are_even(image) && pixels_are_even(image); }

  // NaN and infinities are not.
  bool channels_are_even(int64_t image) const {
    float energy = 0.0f, result = 0.0f, bound = 0.0f;
    for (int64_t channel = 0; channel < args_.in_channels; channel += kSlice) {
      const int64_t end = min_of(args_.in_channels, channel + kSlice);
      float x_energy = 0.0f, weight_energy = 0.0f;
      for (int64_t c = channel; c < end; ++c) {
        float sum = 0.0f;
        for (int64_t y = 0; y < args_.height; ++y) sum += sums_[(image * args_.height + y) * channels_ + c];
        x_energy += sum, weight_energy += weights_[c], result += sum * weights_[c];
      }
      energy += x_energy;
      bound += x_energy * weight_energy / static_cast<float>(end - channel);
    }
    return energy > kLeastEnergy && energy < kMostEnergy && bound <= kMostSquares * result;
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
  float* pixels_;                  // [rows, width]
  float* sums_;                    // [rows, channels]
  float* weights_;                 // [channels]
  uint64_t even_ = 0;              // a bit for each picture
};

}  // namespace
}  // namespace gafext::GAFEXT_ISA
