// 3x3 convolution by conv3x3.cpp's algorithm, with products of 16-bit integers: of 8-bit weights, and of bfloat16 where
// AVX512_VNNI multiplies pairs of integers twice as fast as AVX-512 multiplies float32.
//
// The transforms are computed in float32. Slice by slice of kChannels channels U and V are rounded to integers:
//
//   V = B^T d B, of a tile and a point, times kLimit / |V|                |V| over the channels of the slice, exactly
//   U = G g G^T, of an output channel and a point, times kLimit / |U|     |U| <= |G| |g| |G|^T, where |g| are the taps'
//
// with Euclidean norms. By Cauchy and Schwarz no sum of a slice then exceeds kLimit^2 < 2^31, whatever the numbers are.
// Rounding adds 8e-4 of the result for random numbers (relative norm; bfloat16's own rounding of it is 1.7e-3), and more
// where conv3x3_evenness.h finds them uneven. Sums of slices are float32.
//
// A word holds the channels c and c + kLanes, so that vectors of channels need no shuffle.
#pragma once

#include "conv3x3_winograd.h"
#include "integers.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kChannels = 2 * kDepth;  // of a slice
constexpr int64_t kGroup = 2 * kLanes;     // channels of a vector of words
constexpr float kLimit = 32700.0f;         // with what rounding adds to a norm, at most 32767
constexpr int64_t kScales = round_up(kPoints, kLanes);

// Squares of numbers between these are neither infinite nor rounded to few digits.
constexpr float kSmallSquares = 1e-24f, kLargeSquares = 1e36f;

// sqrt(squares), the sum of squares of up to kChannels numbers; where those are too large or too small for float32,
// that many times the largest of them, `largest()`, which is no less. NaN where one is not finite.
template <typename Largest>
GAFEXT_INLINE Vec norm_of(Vec squares, const Largest& largest) {
  const IntVec usual = (squares > kSmallSquares) & (squares < kLargeSquares);
  bool all = true;
  for (int lane = 0; lane < kLanes; ++lane) all = all && usual[lane] != 0;
  if (__builtin_expect(all, true)) return sqrt_of(squares);
  constexpr float kRoot = 8.0f;
  static_assert(kChannels <= kRoot * kRoot);
  const Vec most = largest(), bound = most < 1e37f ? kRoot * most : broadcast(__builtin_nanf(""));
  return usual ? sqrt_of(squares) : bound;
}

constexpr float kTiny = 1e-33f;  // a norm: kLimit / kTiny is finite

// What `norm` is divided by and multiplied with; zero if it is, or so small that its quotient would overflow.
GAFEXT_INLINE Vec factor_of(Vec norm) { return norm > kTiny ? kLimit / norm : Vec{}; }
GAFEXT_INLINE Vec scale_of(Vec norm) { return norm > kTiny ? norm * (1 / kLimit) : norm > 0.0f ? Vec{} : norm; }

// Words of the 16-bit integers nearest to factor * low and factor * high.
GAFEXT_INLINE BitVec words_of(Vec low, Vec high, Vec factor) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the integer is in the lowest bits of the sum
  return (bit_cast<BitVec>(low * factor + kShift) & 0xffff) | (bit_cast<BitVec>(high * factor + kShift) << 16);
}

GAFEXT_INLINE Vec magnitude_of(Vec v) { return v < 0.0f ? -v : v; }

// c[r, :] = (or +=) row_scale[r] column_scale[:] sum over `words` of a[r, word] b[word, :], of `Rows` rows and kPanel
// columns.
template <Products kind, int Rows, bool accumulate>
void multiply_tile(const uint32_t* a, const float* row_scale, const uint32_t* b, const float* column_scale,
                   int64_t words, float* c) {
  IntVec tile[Rows][kTileVectors] = {};
  add_words<kind>(a, kDepth, b, words, tile);
  GAFEXT_UNROLL
  for (int v = 0; v < kTileVectors; ++v) {
    const Vec of_columns = load(column_scale + v * kLanes);
    GAFEXT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      float* to = c + r * kColumns + v * kLanes;
      const Vec sum = __builtin_convertvector(tile[r][v], Vec) * (of_columns * row_scale[r]);
      // A choice at run time has the compiler round some of the sums twice, depending on where in a tile they are.
      if constexpr (accumulate) {
        store(to, load(to) + sum);
      } else {
        store(to, sum);
      }
    }
  }
}

// Rows of a register tile, of which `tiles` rows waste the fewest.
inline int64_t rows_of_tile(int64_t tiles) {
  int64_t best = kTileRows;
  for (int64_t rows = kTileRows - 1; rows >= kTileRows - 2; --rows) {
    if (round_up(tiles, rows) < round_up(tiles, best)) best = rows;
  }
  return best;
}

template <Products kind, bool accumulate>
auto multiply_tile_of(int64_t rows) {
  static_assert(kTileRows == 6);
  return rows == 6   ? multiply_tile<kind, 6, accumulate>
         : rows == 5 ? multiply_tile<kind, 5, accumulate>
                     : multiply_tile<kind, 4, accumulate>;
}
template <Products kind>
auto multiply_tile_of(int64_t rows, bool accumulate) {
  return accumulate ? multiply_tile_of<kind, true>(rows) : multiply_tile_of<kind, false>(rows);
}

// `Args` with a contiguous weight, whose elements may be a scale for each output channel times what the memory holds.
template <typename Args, typename T, typename Weight>
class WordConvolution {
 public:
  // `scale` is null if the memory holds the weight itself; `is_gradient` is that of Conv3x3Args.
  WordConvolution(const Args& args, const Weight* weight, const float* scale, bool is_gradient = false)
      : args_(args), weight_(weight), scale_(scale), is_gradient_(is_gradient), plan_(args, kChannels) {
    const int64_t block_scales = plan_.depths * kPoints * plan_.block;
    block_floats_ = plan_.input_floats / plan_.superblock + block_scales;
    scale_offset_ = block_floats_ - block_scales;
    thread_floats_ = plan_.thread_floats + kPoints * kColumns;
  }

  void run() {
    float* input = scratch(plan_.superblock * block_floats_ + max_threads() * thread_floats_);
    float* memory = input + plan_.superblock * block_floats_;
    for (int64_t first = 0; first < plan_.tiles; first += plan_.superblock * plan_.block) {
      const int64_t tiles = min_of(plan_.superblock * plan_.block, plan_.tiles - first);
      parallel_for(tiles, [&](int64_t, int64_t tile) {
        transform_tile(first + tile, input + tile / plan_.block * block_floats_, tile % plan_.block);
      });
      parallel_for(ceil_div(tiles, plan_.block) * plan_.columns, [&](int64_t thread, int64_t unit) {
        const int64_t block = unit / plan_.columns, begin = block * plan_.block;
        const Scratch parts(plan_, memory + thread * thread_floats_);
        convolve(input + block * block_floats_, first + begin, min_of(plan_.block, tiles - begin),
                 unit % plan_.columns * kColumns, parts);
      });
    }
  }

 private:
  // One thread's memory.
  struct Scratch {
    uint32_t* weight;  // [kPoints, kColumns / kPanel, kDepth, kPanel]
    float* products;   // [kPoints, block, kColumns]
    float* taps;       // [kChannels, kTaps, kColumns]
    float* scales;     // [kPoints, kColumns]

    Scratch(const Plan& plan, float* memory) {
      weight = reinterpret_cast<uint32_t*>(memory);
      products = memory + kPoints * kPointStride;
      taps = products + kPoints * plan.block * kColumns;
      scales = taps + kChannels * kTaps * kColumns;
    }
  };

  // to[channel, point] = the transformed inputs of kLanes channels from `channel` on.
  GAFEXT_INLINE void transform_channels(const Tile<T>& tile, int64_t channel, float* to) const {
    Vec columns[kIn][kIn];
    transform_columns(args_, tile, channel, columns);
    for (int i = 0; i < kIn; ++i) {
      Vec v[kIn];
      transform_input(columns[i], v);
      GAFEXT_UNROLL
      for (int j = 0; j < kIn; ++j) store(to + (i * kIn + j) * kChannels, v[j]);
    }
  }

  // The norms of kLanes points' `width` channels, a whole number of vectors.
  static GAFEXT_INLINE Vec norms_of(const float* points, int64_t width) {
    Vec squares[kLanes];
    GAFEXT_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      Vec sum{};
      for (int64_t c = 0; c < width; c += kLanes) {
        const Vec v = load(points + i * kChannels + c);
        sum += v * v;
      }
      squares[i] = sum;
    }
    return norm_of(sums_of(squares), [&] {
      Vec most;
      for (int i = 0; i < kLanes; ++i) most[i] = largest_of(points + i * kChannels, width);
      return most;
    });
  }

  // max|v|; NaN where one is.
  static float largest_of(const float* from, int64_t count) {
    IntVec most{};  // as integers: NaN is above infinity
    for (int64_t c = 0; c < count; c += kLanes) {
      const IntVec bits = bit_cast<IntVec>(load(from + c)) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    int32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits = most[lane] > bits ? most[lane] : bits;
    return bit_cast<float>(bits);
  }

  // Row `row` of a block's words, [depths, kPoints, block, kDepth], and scales, [depths, kPoints, block].
  void transform_tile(int64_t tile, float* block, int64_t row) const {
    const Tile<T> from(args_, plan_, tile);
    alignas(64) float points[kScales * kChannels], factors[kScales];
    for (float* to = points + kPoints * kChannels; to < points + kScales * kChannels; to += kLanes) {
      store(to, broadcast(1.0f));  // of no point; of usual size
    }
    for (int64_t channel = 0; channel < args_.in_channels; channel += kChannels) {
      const int64_t slice = channel / kChannels * kPoints;
      const int64_t width = min_of(kChannels, round_up(args_.in_channels - channel, kGroup));
      for (int64_t c = 0; c < width; c += kLanes) transform_channels(from, channel + c, points + c);
      for (int64_t p = 0; p < kScales; p += kLanes) {
        const Vec norm = norms_of(points + p * kChannels, width), scale = scale_of(norm);
        store(factors + p, factor_of(norm));
        for (int64_t i = 0; i < min_of(kLanes, kPoints - p); ++i) {
          block[scale_offset_ + (slice + p + i) * plan_.block + row] = scale[i];
        }
      }
      for (int64_t p = 0; p < kPoints; ++p) {
        float* to = block + ((slice + p) * plan_.block + row) * kDepth;
        for (int64_t c = 0; c < width; c += kGroup, to += kLanes) {
          const float* v = points + p * kChannels + c;
          const BitVec words = words_of(load(v), load(v + kLanes), broadcast(factors[p]));
          __builtin_memcpy(to, &words, sizeof(words));
        }
      }
    }
  }

  // From one channel to the next of the weight's first dimension.
  int64_t weight_row() const { return (is_gradient_ ? args_.out_channels : args_.in_channels) * kTaps; }

  // The taps of input channel `channel` and output channel `column`.
  const Weight* first_weight(int64_t channel, int64_t column) const {
    return weight_ + (is_gradient_ ? channel * weight_row() + column * kTaps : column * weight_row() + channel * kTaps);
  }

  // The taps of `depth` channels from `channel` on, zeros up to `padded`.
  void transpose_taps(int64_t channel, int64_t depth, int64_t padded, int64_t column, int64_t count,
                      float* taps) const {
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      const int64_t lanes = max_of(0, min_of(kLanes, count - c));
      if (!is_gradient_) {
        const Weight* from = first_weight(channel, column + c);
        transpose_rows(taps + c, kColumns, from, weight_row(), lanes, depth * kTaps);
        continue;
      }
      for (int64_t k = 0; k < depth; ++k) {  // from the last tap on
        float* last = taps + (k * kTaps + kTaps - 1) * kColumns + c;
        transpose_rows(last, -kColumns, first_weight(channel + k, column + c), kTaps, lanes, kTaps);
      }
    }
    for (float* to = taps + depth * kTaps * kColumns; to < taps + padded * kTaps * kColumns; to += kLanes) {
      store(to, Vec{});
    }
  }

  // One dimension of |G| n.
  static GAFEXT_INLINE void transform_norm(Vec n0, Vec n1, Vec n2, Vec (&u)[kIn]) {
    constexpr float at_a = 1.0f / (2 * kA2 * (kB2 - kA2)), at_b = 1.0f / (2 * kB2 * (kB2 - kA2));
    u[0] = (1.0f / (kA2 * kB2)) * n0;
    u[1] = u[2] = at_a * n0 + (at_a * kA) * n1 + (at_a * kA2) * n2;
    u[3] = u[4] = at_b * n0 + (at_b * kB) * n1 + (at_b * kB2) * n2;
    u[5] = n2;
  }

  // The factors of kLanes output channels' points, and their scales.
  void scale_weights(const float* taps, int64_t depth, Vec of_channel, Vec (&factors)[kPoints], float* scales) const {
    Vec rows[3][kIn], norms[kTaps];
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      const float* from = taps + tap * kColumns;
      Vec squares{};
      for (int64_t k = 0; k < depth; ++k) {
        const Vec g = load(from + k * kTaps * kColumns);
        squares += g * g;
      }
      norms[tap] = norm_of(squares, [&] {
        Vec most{};
        for (int64_t k = 0; k < depth; ++k) {
          const Vec g = magnitude_of(load(from + k * kTaps * kColumns));
          most = g > most || g != g ? g : most;
        }
        return most;
      });
    }
    for (int i = 0; i < 3; ++i) transform_norm(norms[3 * i], norms[3 * i + 1], norms[3 * i + 2], rows[i]);
    for (int j = 0; j < kIn; ++j) {
      Vec u[kIn];
      transform_norm(rows[0][j], rows[1][j], rows[2][j], u);
      for (int i = 0; i < kIn; ++i) {
        factors[i * kIn + j] = factor_of(u[i]);
        store(scales + (i * kIn + j) * kColumns, scale_of(u[i]) * of_channel);
      }
    }
  }

  // The transformed weights of a slice of `depth` channels from `channel` on, for output channels
  // [column, column + count), and their scales.
  void transform_weights(int64_t channel, int64_t depth, int64_t column, int64_t count, const Scratch& scratch) const {
    const int64_t padded = round_up(depth, kGroup);
    transpose_taps(channel, depth, padded, column, count, scratch.taps);
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      Vec factors[kPoints];
      const Vec of_channel = scale_ == nullptr ? broadcast(1.0f) : load_up_to(scale_ + column + c, count - c);
      scale_weights(scratch.taps + c, depth, of_channel, factors, scratch.scales + c);
      for (int64_t k = 0; k < padded / 2; ++k) {
        Vec rows[2][3][kIn];
        for (int half = 0; half < 2; ++half) {
          const float* taps = scratch.taps + (k / kLanes * kGroup + k % kLanes + half * kLanes) * kTaps * kColumns + c;
          GAFEXT_UNROLL
          for (int i = 0; i < 3; ++i) {
            transform_weight(load(taps + (3 * i) * kColumns), load(taps + (3 * i + 1) * kColumns),
                             load(taps + (3 * i + 2) * kColumns), rows[half][i]);
          }
        }
        uint32_t* to = scratch.weight + c / kPanel * kDepth * kPanel + k * kPanel + c % kPanel;
        GAFEXT_UNROLL
        for (int j = 0; j < kIn; ++j) {
          Vec low[kIn], high[kIn];
          transform_weight(rows[0][0][j], rows[0][1][j], rows[0][2][j], low);
          transform_weight(rows[1][0][j], rows[1][1][j], rows[1][2][j], high);
          GAFEXT_UNROLL
          for (int i = 0; i < kIn; ++i) {
            const BitVec words = words_of(low[i], high[i], factors[i * kIn + j]);
            __builtin_memcpy(to + (i * kIn + j) * kPointStride, &words, sizeof(words));
          }
        }
      }
    }
  }

  // products (+)= the 36 matrix products of the slice from `channel` on. `next` are the weights of the slice after it.
  // Register tiles are whole: the rows beyond `tiles` are scratch that nothing reads.
  void multiply_slice(const float* block, int64_t channel, int64_t depth, int64_t tiles, Prefetcher next,
                      const Scratch& scratch) const {
    const int64_t rows = rows_of_tile(tiles);
    auto* multiply = multiply_tile_of<Products::kPairs>(rows, channel > 0);
#if defined(__AVX512F__)
    if (has_vnni()) multiply = multiply_tile_of<Products::kPairsVnni>(rows, channel > 0);
#endif
    const int64_t words = round_up(depth, kGroup) / 2, slice = channel / kChannels * kPoints;
    for (int64_t point = 0; point < kPoints; ++point) {
      for (int64_t panel = 0; panel < kColumns; panel += kPanel) {
        const uint32_t* weight = scratch.weight + point * kPointStride + panel * kDepth;
        for (int64_t tile = 0; tile < tiles; tile += rows) {
          next.fetch();
          const int64_t row = (slice + point) * plan_.block + tile;
          multiply(reinterpret_cast<const uint32_t*>(block) + row * kDepth, block + scale_offset_ + row, weight,
                   scratch.scales + point * kColumns + panel, words,
                   scratch.products + (point * plan_.block + tile) * kColumns + panel);
        }
      }
    }
  }

  // One unit: `tiles` tiles from `first` on, output channels from `column` on.
  void convolve(const float* block, int64_t first, int64_t tiles, int64_t column, const Scratch& scratch) const {
    const int64_t count = min_of(kColumns, args_.out_channels - column);
    const int64_t calls = kPoints * (kColumns / kPanel) * ceil_div(tiles, kTileRows);
    for (int64_t channel = 0; channel < args_.in_channels; channel += kChannels) {
      const int64_t depth = min_of(kChannels, args_.in_channels - channel), after = channel + depth;
      transform_weights(channel, depth, column, count, scratch);
      const int64_t coming = min_of(kChannels, args_.in_channels - after);
      const Prefetcher next(first_weight(after, column), weight_row() * sizeof(Weight), is_gradient_ ? coming : count,
                            (is_gradient_ ? count : coming) * kTaps * sizeof(Weight), calls);
      multiply_slice(block, channel, depth, tiles, next, scratch);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      write_tile<T>(args_, plan_, first + tile, scratch.products + tile * kColumns, column, count);
    }
  }

  const Args& args_;
  const Weight* const weight_;
  const float* const scale_;
  const bool is_gradient_;
  const Plan plan_;
  int64_t block_floats_, scale_offset_, thread_floats_;
};

}  // namespace
}  // namespace gafext::GAFEXT_ISA
