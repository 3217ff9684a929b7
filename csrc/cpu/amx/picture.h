// A picture as AMX tiles take it for a 3x3 convolution: 16 neighbouring pixels are a tile, and so are they moved by a tap.
//
//   planes   [groups, copies, rows, line, 16 words]: a group is 64 bytes of channels; a row of pixels outside of it
//            comes before each picture and after it
//
// A strip is 16 pixels of a picture in their order, of which the last one's may be missing. Where rows are whole strips,
// there is one copy, with a pixel from outside before and after each row. Elsewhere strips continue in the next row, and
// there are three copies, moved by -1, 0 and 1 pixels: no product is of a pixel that is not there but in the last strip.
#pragma once

#include "../../ops/conv3x3.h"
#include "../pictures.h"
#include "product.h"

#if defined(__AMX_BF16__)
namespace gafext::GAFEXT_ISA {
namespace {

struct PictureSize {
  int64_t batch, height, width;
};

class TiledPicture {
 public:
  static constexpr int64_t kTaps = 9;

  TiledPicture(PictureSize size, int64_t groups)
      : size_(size),
        groups_(groups),
        pixels_(size.height * size.width),
        strips_(ceil_div(pixels_, kTileSide)),
        copies_(size.width % kTileSide == 0 ? 1 : 3),
        line_(copies_ == 1 ? size.width + 2 : size.width),
        rows_(size.batch * (size.height + 2)),
        copy_words_((rows_ * line_ + kTileSide) * kTileSide) {}

  int64_t strips() const { return size_.batch * strips_; }
  int64_t words() const { return groups_ * group_words(); }
  int64_t group_words() const { return copies_ * copy_words_; }

  int64_t tap_words(int64_t tap) const {
    const int64_t dy = tap / 3 - 1, dx = tap % 3 - 1;
    return dy * line_ * kTileSide + (copies_ == 1 ? dx * kTileSide : (dx + 1) * copy_words_);
  }

  // Two strips, beyond which their tiles lie at `offsets`; a second one that is missing is the first again.
  ScatteredStrips strips_of(int64_t pair, int64_t group, const int64_t* offsets) const {
    const uint32_t* first = strip(2 * pair);
    const int64_t stride = 2 * pair + 1 < strips() ? strip(2 * pair + 1) - first : 0;
    return {first + group * group_words(), stride, offsets};
  }

  // Of all strips' pixels, the number among all pixels; -1 for one that is missing.
  int64_t pixel(int64_t row) const {
    const int64_t strip = row / kTileSide, pixel = strip % strips_ * kTileSide + row % kTileSide;
    return pixel < pixels_ ? strip / strips_ * pixels_ + pixel : -1;
  }

  // load(image, y, x, group) gives the 64 bytes of a pixel, outside(image) those of one outside.
  template <typename Load, typename Outside>
  void fill(uint32_t* memory, const Load& load, const Outside& outside) {
    words_ = memory;
    parallel_for(rows_, [&](int64_t, int64_t row) {
      for (int64_t group = 0; group < groups_; ++group) fill_row(row, group, load, outside);
    });
  }

 private:
  const uint32_t* strip(int64_t strip) const {
    const int64_t first = strip % strips_ * kTileSide, row = strip / strips_ * (size_.height + 2) + 1;
    const int64_t pixel =
        copies_ == 1 ? (row + first / size_.width) * line_ + 1 + first % size_.width : row * line_ + first;
    return words_ + pixel * kTileSide;
  }

  template <typename Load, typename Outside>
  void fill_row(int64_t row, int64_t group, const Load& load, const Outside& outside) {
    const int64_t image = row / (size_.height + 2), y = row % (size_.height + 2) - 1;
    const int64_t end = row + 1 < rows_ ? line_ : line_ + kTileSide;  // with what the last strip reads
    const BitVec beyond = outside(image);
    uint32_t* to = words_ + group * group_words() + row * line_ * kTileSide;
    for (int64_t copy = 0; copy < copies_; ++copy, to += copy_words_) {
      const int64_t first = copies_ == 1 ? -1 : copy - 1;  // the x of the line's first pixel
      for (int64_t i = 0; i < end; ++i) {
        const int64_t x = first + i;
        const bool there = y >= 0 && y < size_.height && x >= 0 && x < size_.width;
        const BitVec words = there ? load(image, y, x, group) : beyond;
        __builtin_memcpy(to + i * kTileSide, &words, sizeof(words));
      }
    }
  }

  const PictureSize size_;
  const int64_t groups_, pixels_, strips_, copies_, line_, rows_, copy_words_;
  uint32_t* words_ = nullptr;
};

// What direct 3x3 convolutions share of product.h's `Problem`: rows are pixels, and a chunk is all taps of up to
// kMostGroups groups of kChannels channels. Left to them are the columns, and what is written.
template <typename T, typename Args, int64_t kChannels>
class PictureProduct {
 public:
  static constexpr bool kGathers = false;
  static constexpr int64_t kMaxPairs = 4, kMaxRowPairs = 32;

  explicit PictureProduct(const Args& args)
      : args_(args),
        groups_(ceil_div(args.in_channels, kChannels), kMostGroups),
        picture_({args.batch, args.height, args.width}, groups_.steps) {
    for (int64_t step = 0; step < longest_chunk(); ++step) {
      offsets_[step] = step / kTaps * picture_.group_words() + picture_.tap_words(step % kTaps);
    }
  }

  int64_t rows() const { return picture_.strips() * kTileSide; }
  int64_t column_pairs() const { return ceil_div(args_.out_channels, kBlock); }
  int64_t chunks() const { return groups_.count; }
  int64_t longest_chunk() const { return groups_.longest * kTaps; }
  int64_t steps(int64_t chunk) const { return (groups_.end(chunk) - groups_.begin(chunk)) * kTaps; }

  ScatteredStrips left(int64_t row_pair, int64_t chunk, uint32_t*) const {
    return picture_.strips_of(row_pair, groups_.begin(chunk), offsets_);
  }

  void prefetch_out(int64_t row, int64_t rows, int64_t pair) const {
    for (int64_t r = row; r < row + rows; ++r) {
      const int64_t pixel = picture_.pixel(r);
      if (pixel >= 0) prefetch_to_write(static_cast<const T*>(args_.out) + pixel * args_.out_channels + pair * kBlock);
    }
  }
  void prefetch_rows(int64_t, int64_t, int64_t, int64_t, int64_t) const {}

 protected:
  static constexpr int64_t kTaps = TiledPicture::kTaps;
  static constexpr int64_t kMostGroups = 4;

  const T* pixel(int64_t image, int64_t y, int64_t x) const {
    const PixelStrides& stride = args_.x_stride;
    return static_cast<const T*>(args_.x) + image * stride.image + y * stride.row + x * stride.column;
  }

  // Output columns [column, column + kBlock) of a pixel: value(c, count) of each vector of them, bias and residual added.
  template <typename Value>
  GAFEXT_INLINE void write_pixel(int64_t pixel, int64_t column, const Value& value) const {
    const int64_t line = pixel / args_.width, image = line / args_.height;
    const PixelStrides& stride = args_.residual_stride;
    const T *bias = static_cast<const T*>(args_.bias), *residual = static_cast<const T*>(args_.residual);
    if (bias != nullptr) bias += image * args_.bias_stride;
    if (residual != nullptr) {
      residual += image * stride.image + line % args_.height * stride.row + pixel % args_.width * stride.column;
    }
    T* out = static_cast<T*>(args_.out) + pixel * args_.out_channels;
    for (int64_t c = column, end = min_of(column + kBlock, args_.out_channels); c < end; c += kLanes) {
      Vec sum = value(image, c, end - c);
      if (bias != nullptr) sum += load_up_to(bias + c, end - c);
      if (residual != nullptr) sum += load_up_to(residual + c, end - c);
      end - c >= kLanes ? store_rounded(out + c, sum) : store_first(out + c, sum, end - c);
    }
  }

  const Args& args_;
  const Chunks groups_;
  TiledPicture picture_;
  int64_t offsets_[kMostGroups * kTaps];  // from a strip to its tiles of a chunk, in words
};

constexpr int64_t kPictureWords = int64_t{12} << 20;  // at a time, or one picture: 48 MB

// Calls run(args) with as many pictures at a time as kPictureWords hold, `groups` groups of channels each.
template <typename T, typename Args, typename Run>
void for_some_pictures(const Args& args, int64_t groups, const Run& run) {
  const int64_t words = TiledPicture({1, args.height, args.width}, groups).words();
  const int64_t count = max_of(1, kPictureWords / words);
  for (int64_t first = 0; first < args.batch; first += count) {
    run(pictures_of<T>(args, first, min_of(count, args.batch - first)));
  }
}

}  // namespace
}  // namespace gafext::GAFEXT_ISA
#endif
