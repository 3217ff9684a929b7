// GroupNorm and SiLU of channels-last memory: x is read once for the moments, and once more to be normalised.
//
// Blocks    Eight positions at a time are in registers, one vector of channels after the other: first their mean, then
//           the squared distances from it, which are added to the moments of each channel (Chan, Golub and LeVeque,
//           "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"). So a large mean costs no
//           digits of the variance.
// Chunks    of 16384 elements, or 8 positions, fold the moments of their channels into those of their groups. An image
//           adds them up in float64. Chunks depend on sizes alone: the bits are the same on any number of threads.
// Threads   take whole images where those are enough, the last chunk written first, because the caches still hold it;
//           otherwise chunks of all images, for the moments and then for the result.
#include "../ops/group_norm_silu.h"

#include "vector.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kBlock = 8;      // positions
constexpr int64_t kChunk = 16384;  // elements

// Elements ahead that are prefetched for the result: 1.1 to 1.3 times as fast without SiLU where x exceeds the L2 cache.
constexpr int64_t kAhead = 128;

// Of positions and channels: the mean, and the sum of the squared distances from it.
struct Moments {
  double mean, square;
};
constexpr int64_t kMomentsFloats = sizeof(Moments) / sizeof(float);

// The sum of a power of two of vectors, which it overwrites.
template <int kCount>
GAFEXT_INLINE Vec sum_in_pairs(Vec (&terms)[kCount]) {
  GAFEXT_UNROLL
  for (int half = kCount / 2; half > 0; half /= 2) {
    GAFEXT_UNROLL
    for (int i = 0; i < half; ++i) terms[i] += terms[i + half];
  }
  return terms[0];
}

// kCount positions of a channel, added to `before` others.
template <int kCount, typename T>
GAFEXT_INLINE void add_positions(const T* x, int64_t stride, int64_t channels, int64_t before, float* mean,
                                 float* square) {
  const float share = static_cast<float>(kCount) / static_cast<float>(before + kCount);
  const float weight = share * static_cast<float>(before);
  const auto add = [&](int64_t c, auto load_vector) {
    Vec values[kCount], sums[kCount], squares[kCount];
    GAFEXT_UNROLL
    for (int i = 0; i < kCount; ++i) {
      __builtin_prefetch(x + (kCount + i) * stride + c);  // 7 to 10 % of the time where x exceeds the L2 cache
      sums[i] = values[i] = load_vector(x + i * stride + c);
    }
    const Vec center = sum_in_pairs(sums) * (1.0f / kCount);
    GAFEXT_UNROLL
    for (int i = 0; i < kCount; ++i) squares[i] = (values[i] - center) * (values[i] - center);
    const Vec old = load(mean + c), step = center - old;
    store(mean + c, old + step * share);
    store(square + c, load(square + c) + (sum_in_pairs(squares) + step * (step * weight)));
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) add(c, [](const T* from) { return load(from); });
  if (c < channels) add(c, [&](const T* from) { return load_first(from, channels - c); });
}

// value(load(from + i)) over all i < count; the vectors' lanes first.
template <typename Value>
GAFEXT_INLINE float sum_of(const float* from, int64_t count, const Value& value) {
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum += value(load(from + i));
  float rest = 0.0f;
  for (; i < count; ++i) rest += value(from[i]);
  return sum_in(sum) + rest;
}

// y / (1 + exp(-y))
GAFEXT_INLINE Vec silu_of(Vec y) {
  const Vec exponent = y * -kLog2E;
  return y / (1.0f + exp2_of(exponent > 128.0f ? broadcast(128.0f) : exponent));
}

template <typename T>
class Norm {
 public:
  explicit Norm(const GroupNormSiluArgs& args) : args_(args) {
    padded_ = round_up(args.channels, kLanes) + kLanes;
    positions_ = max_of(kBlock, kChunk / args.channels / kBlock * kBlock);
    chunks_ = ceil_div(args.positions, positions_);
    const int64_t moments = args.batch * chunks_ * args.groups;
    of_threads_ = scratch(moments * kMomentsFloats + padded_ * (2 * max_threads() + 3 * args.batch + 2));
    of_images_ = of_threads_ + 2 * padded_ * max_threads();
    weight_ = of_images_ + 3 * padded_ * args.batch;
    moments_ = reinterpret_cast<Moments*>(weight_ + 2 * padded_);
    const auto widen = [&](const void* from, float* to, float otherwise) {
      if (from != nullptr) return copy_row(to, static_cast<const T*>(from), args.channels);
      for (int64_t c = 0; c < args.channels; ++c) to[c] = otherwise;
    };
    widen(args.weight, weight_, 1.0f);
    widen(args.bias, weight_ + padded_, 0.0f);
  }

  int64_t chunks() const { return chunks_; }

  // The moments of every group in a chunk.
  void take_moments(int64_t thread, int64_t image, int64_t chunk) const {
    const int64_t channels = args_.channels, first = chunk * positions_, count = count_of(chunk);
    float *mean = of_threads_ + thread * 2 * padded_, *square = mean + padded_;
    for (int64_t c = 0; c < 2 * padded_; ++c) mean[c] = 0.0f;
    const T* x = position(image, first);
    int64_t p = 0;
    for (; p + kBlock <= count; p += kBlock) {
      add_positions<kBlock>(x + p * args_.position_stride, args_.position_stride, channels, p, mean, square);
    }
    for (; p < count; ++p) {
      add_positions<1>(x + p * args_.position_stride, args_.position_stride, channels, p, mean, square);
    }
    const int64_t width = channels / args_.groups;
    for (int64_t g = 0; g < args_.groups; ++g, mean += width, square += width) {
      const float center = sum_of(mean, width, [](auto v) { return v; }) / static_cast<float>(width);
      const float between = sum_of(mean, width, [&](auto v) { return (v - center) * (v - center); });
      const float within = sum_of(square, width, [](auto v) { return v; });
      moments_[(image * chunks_ + chunk) * args_.groups + g] = {center, within + between * static_cast<float>(count)};
    }
  }

  // Of every channel: the mean as a float32, the factor, and the summand with what the mean has beyond float32. A
  // group's last vector reaches into the next group, which comes after.
  void take_scales(int64_t image) const {
    const int64_t width = args_.channels / args_.groups;
    float *means = of_images_ + image * 3 * padded_, *scales = means + padded_, *shifts = scales + padded_;
    for (int64_t g = 0; g < args_.groups; ++g) {
      const Moments all = moments_of(image, g);
      const double variance = all.square / static_cast<double>(args_.positions * width);
      const auto rstd = static_cast<float>(1.0 / __builtin_sqrt(variance + args_.eps));
      const auto mean = static_cast<float>(all.mean), rest = static_cast<float>(all.mean - mean);
      for (int64_t c = g * width; c < (g + 1) * width; c += kLanes) {
        const Vec scale = load(weight_ + c) * rstd;
        store(means + c, broadcast(mean));
        store(scales + c, scale);
        store(shifts + c, load(weight_ + padded_ + c) - rest * scale);
      }
    }
  }

  void write(int64_t image, int64_t chunk) const {
    args_.silu ? write_as(image, chunk, silu_of) : write_as(image, chunk, [](Vec y) { return y; });
  }

 private:
  int64_t count_of(int64_t chunk) const { return min_of(positions_, args_.positions - chunk * positions_); }

  const T* position(int64_t image, int64_t p) const {
    return static_cast<const T*>(args_.x) + image * args_.image_stride + p * args_.position_stride;
  }

  Moments moments_of(int64_t image, int64_t group) const {
    const int64_t width = args_.channels / args_.groups;
    Moments all{};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const Moments& part = moments_[(image * chunks_ + chunk) * args_.groups + group];
      const double before = static_cast<double>(chunk * positions_), count = static_cast<double>(count_of(chunk));
      const double step = part.mean - all.mean, share = count / (before + count);
      all.mean += step * share;
      all.square += part.square + step * step * share * before * static_cast<double>(width);
    }
    return all;
  }

  template <typename Activation>
  GAFEXT_INLINE void write_as(int64_t image, int64_t chunk, const Activation& activation) const {
    const int64_t channels = args_.channels, first = chunk * positions_;
    const float *mean = of_images_ + image * 3 * padded_, *scale = mean + padded_, *shift = scale + padded_;
    const auto normalized = [&](Vec values, int64_t c) {
      return activation((values - load(mean + c)) * load(scale + c) + load(shift + c));
    };
    for (int64_t p = first; p < first + count_of(chunk); ++p) {
      const T* x = position(image, p);
      T* out = static_cast<T*>(args_.out) + (image * args_.positions + p) * channels;
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) {
        __builtin_prefetch(x + c + kAhead);
        prefetch_to_write(out + c + kAhead);
        store(out + c, normalized(load(x + c), c));
      }
      if (const int64_t rest = channels - c; rest > 0) {
        store_first(out + c, normalized(load_first(x + c, rest), c), rest);
      }
    }
  }

  const GroupNormSiluArgs& args_;
  int64_t padded_, positions_, chunks_;  // channels, and more than a vector; positions of a chunk
  float* of_threads_;                    // [2, padded_] each: moments of channels
  float* of_images_;                     // [3, padded_] each: means, factors, summands of channels
  float* weight_;                        // [2, padded_]: weight, bias
  Moments* moments_;                     // [batch, chunks_, groups]
};

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args) {
  if (args.batch * args.positions * args.channels == 0) return;
  with_element_type(args.dtype, [&](auto element) {
    const Norm<decltype(element)> norm(args);
    const int64_t chunks = norm.chunks(), threads = max_threads();
    if (args.batch % threads == 0 || args.batch >= 4 * threads) {
      parallel_for(args.batch, [&](int64_t thread, int64_t image) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) norm.take_moments(thread, image, chunk);
        norm.take_scales(image);
        for (int64_t chunk = chunks; chunk-- > 0;) norm.write(image, chunk);
      });
    } else {
      parallel_for(args.batch * chunks,
                   [&](int64_t thread, int64_t unit) { norm.take_moments(thread, unit / chunks, unit % chunks); });
      parallel_for(args.batch, [&](int64_t, int64_t image) { norm.take_scales(image); });
      parallel_for(args.batch * chunks, [&](int64_t, int64_t unit) { norm.write(unit / chunks, unit % chunks); });
    }
  });
}

}  // namespace gafext::GAFEXT_ISA
