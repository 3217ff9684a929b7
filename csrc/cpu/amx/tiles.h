// Products of float32 matrices on AMX tiles, which multiply bfloat16 and add in float32.
//
// A float32 is the sum of three bfloat16: hi, mid and lo hold 8 bits of its 24 each. Of the nine products of two such
// sums six count, hi lo + hi mid + mid mid + mid hi + lo hi + hi hi; the other three are below 2^-23 of the whole. Each
// product is exact, so what is left is the error of adding in float32: over 640 numbers 0.6 times MKL's sgemm.
//
//   split      [strips, steps, terms, 16, 16 words]: a strip is 16 rows of the left operand or 16 columns of the
//              right, a step 32 of what is summed over; word i of a line holds numbers i and i + 16 of the step. So a
//              tile is 1 KB in a row, and splitting takes no shuffle but the transposition of one operand.
//   multiply   32 x 32 numbers at a time: tiles 0..3 are sums, 4 and 5 a term of the left, 6 and 7 of the right
//
// A tile product takes 16 cycles for 16 * 16 * 32 multiply-adds: with six of them 171 flop a cycle, where two AVX-512
// units have 64. Loads, 8 cycles each, number 14 for 24 products. Out of the L2 cache a Sapphire Rapids core was
// measured at 340 GFLOP/s (of float32; AVX-512: 140), and at 415 multiplying zeros, which leave it a higher clock; out
// of the L3 cache at 240 to 300.
//
// A float16 is the sum of two terms, and three products are exact; a bfloat16 is one.
//
// AMX takes subnormal numbers for zero, and hi of a huge number overflows: `Range` says when to fall back.
#pragma once

#include "../vector.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace gafext::GAFEXT_ISA {

constexpr int64_t kTileSide = 16, kTileDepth = 32, kTileWords = kTileSide * kTileSide;
constexpr int64_t kBlock = 2 * kTileSide;  // rows and columns of a product

constexpr int kFloat32Terms = 3;  // of a float32
template <typename T>
inline constexpr int kTermsOf = kFloat32Terms;
template <>
inline constexpr int kTermsOf<Float16> = 2;
template <>
inline constexpr int kTermsOf<BFloat16> = 1;
constexpr int64_t step_words(int terms) { return terms * kTileWords; }
constexpr int64_t kStepWords = step_words(kFloat32Terms);

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_line = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kEightWholeTiles;

// While one exists, the thread that constructed it may use tiles.
class TileState {
 public:
  TileState() { _tile_loadconfig(&kEightWholeTiles); }
  ~TileState() { _tile_release(); }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;
};

// The largest magnitude among numbers, to 8 bits. fits(): it is 0 or within 2^-50..2^50, so that nothing overflows and
// what AMX flushes to zero, below 2^-126, does not count.
class Range {
 public:
  GAFEXT_INLINE void add(BitVec hi) {
    const Halves magnitude = bit_cast<Halves>(hi & 0x7fff7fff);
    highest_ = magnitude > highest_ ? magnitude : highest_;
  }
  bool fits() const {
    uint16_t highest = 0;
    for (int i = 0; i < 2 * kLanes; ++i) highest = highest_[i] > highest ? highest_[i] : highest;
    return highest == 0 || (highest >= (127 - 50) << 7 && highest <= (127 + 50) << 7);
  }

 private:
  typedef uint16_t Halves __attribute__((vector_size(4 * kLanes)));
  Halves highest_ = {};
};

// The terms of `a` in the lower halves and of `b` in the upper. hi is rounded, which makes the sign of mid, and so of
// the products left out, random. A subnormal has bits below the last term.
template <int Terms>
GAFEXT_INLINE void split(Vec a, Vec b, BitVec (&terms)[Terms]) {
  constexpr uint32_t kUpper = 0xffff0000;
  const BitVec a_rounded = bit_cast<BitVec>(a) + 0x8000, b_hi = (bit_cast<BitVec>(b) + 0x8000) & kUpper;
  Vec a_rest = a - bit_cast<Vec>(a_rounded & kUpper), b_rest = b - bit_cast<Vec>(b_hi);
  terms[0] = (a_rounded >> 16) | b_hi;
  GAFEXT_UNROLL
  for (int t = 1; t < Terms; ++t) {
    const BitVec a_term = bit_cast<BitVec>(a_rest), b_term = bit_cast<BitVec>(b_rest) & kUpper;
    terms[t] = (a_term >> 16) | b_term;
    a_rest -= bit_cast<Vec>(a_term & kUpper), b_rest -= bit_cast<Vec>(b_term);
  }
}

// Line `line` of the tiles of a step.
template <int Terms>
GAFEXT_INLINE void store_terms(uint32_t* to, int64_t line, const BitVec (&terms)[Terms]) {
  GAFEXT_UNROLL
  for (int t = 0; t < Terms; ++t) __builtin_memcpy(to + t * kTileWords + line * kTileSide, &terms[t], sizeof(BitVec));
}

template <int Terms>
GAFEXT_INLINE void store_split(uint32_t* to, int64_t line, Vec a, Vec b, Range& range) {
  BitVec terms[Terms];
  split(a, b, terms);
  range.add(terms[0]);
  store_terms(to, line, terms);
}

// store(), of bfloat16 in one instruction, which takes subnormal numbers for zero as tile products do.
template <typename T>
GAFEXT_INLINE void store_rounded(T* to, Vec v) {
  store(to, v);
}
#if defined(__AVX512BF16__) && !defined(GAFEXT_EMULATOR)
GAFEXT_INLINE void store_rounded(BFloat16* to, Vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
  __builtin_memcpy(to, &rounded, sizeof(rounded));
}
#endif

// 32 numbers as they lie in memory, what is missing is zero: word i holds numbers 2 i and 2 i + 1.
GAFEXT_INLINE BitVec load_pairs_up_to(const BFloat16* from, int64_t count) {
  const __mmask32 wanted = count >= kTileDepth ? ~0u : count > 0 ? (1u << count) - 1 : 0u;
  return bit_cast<BitVec>(_mm512_maskz_loadu_epi16(wanted, from));
}

// split_rows, split_columns and split_down, below, for bfloat16, which is one term. A pair of a row or column is two
// neighbours, which lie in memory as AMX takes them.
inline void copy_rows(uint32_t* to, const BFloat16* from, int64_t stride, int64_t rows, int64_t depth, Range& range) {
  for (int64_t d = 0; d < depth; d += kTileDepth, to += kTileWords) {
    for (int64_t r = 0; r < kTileSide; ++r) {
      const BitVec pairs[1] = {load_pairs_up_to(from + r * stride + d, r < rows ? depth - d : 0)};
      range.add(pairs[0]);
      store_terms(to, r, pairs);
    }
  }
}

inline void copy_columns(uint32_t* to, const BFloat16* from, int64_t stride, int64_t columns, int64_t depth,
                         Range& range) {
  for (int64_t d = 0; d < depth; d += kTileDepth, to += kTileWords) {
    Vec lines[kTileSide];
    for (int64_t c = 0; c < kTileSide; ++c) {
      const BitVec pairs = load_pairs_up_to(from + c * stride + d, c < columns ? depth - d : 0);
      range.add(pairs);
      lines[c] = bit_cast<Vec>(pairs);
    }
    transpose(lines);
    for (int64_t i = 0; i < kTileSide; ++i) store_terms<1>(to, i, {bit_cast<BitVec>(lines[i])});
  }
}

GAFEXT_INLINE BitVec load_words_up_to(const BFloat16* from, int64_t count) {
  const __mmask16 wanted = count >= kTileSide ? ~0u : count > 0 ? (1u << count) - 1 : 0u;
  return bit_cast<BitVec>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(wanted, from)));
}

inline void copy_down(uint32_t* to, const BFloat16* from, int64_t stride, int64_t depth, int64_t columns,
                      Range& range) {
  for (int64_t d = 0; d < depth; d += kTileDepth, to += kTileWords) {
    for (int64_t i = 0; i < kTileSide; ++i) {
      const BFloat16 *lower = from + (d + i) * stride, *upper = lower + kTileSide * stride;
      const BitVec pairs[1] = {load_words_up_to(lower, d + i < depth ? columns : 0) |
                               load_words_up_to(upper, d + i + kTileSide < depth ? columns : 0) << 16};
      range.add(pairs[0]);
      store_terms(to, i, pairs);
    }
  }
}

// A strip of the left operand: `rows` <= 16 rows of `depth` numbers times `factor`; what is missing is zero.
template <int Terms = kFloat32Terms, typename T>
void split_rows(uint32_t* to, const T* from, int64_t stride, int64_t rows, int64_t depth, float factor, Range& range) {
  if constexpr (Terms == 1) return copy_rows(to, from, stride, rows, depth, range);
  for (int64_t d = 0; d < depth; d += kTileDepth, to += step_words(Terms)) {
    for (int64_t r = 0; r < kTileSide; ++r) {
      const T* row = from + r * stride + d;
      const int64_t count = r < rows ? depth - d : 0;
      store_split<Terms>(to, r, load_up_to(row, count) * factor, load_up_to(row + kLanes, count - kLanes) * factor,
                         range);
    }
  }
}

// A strip of the right operand: its columns are `columns` <= 16 rows of `depth` numbers.
template <int Terms = kFloat32Terms, typename T>
void split_columns(uint32_t* to, const T* from, int64_t stride, int64_t columns, int64_t depth, Range& range) {
  if constexpr (Terms == 1) return copy_columns(to, from, stride, columns, depth, range);
  for (int64_t d = 0; d < depth; d += kTileDepth, to += step_words(Terms)) {
    Vec lower[kTileSide], upper[kTileSide];
    for (int64_t c = 0; c < kTileSide; ++c) {
      const T* column = from + c * stride + d;
      const int64_t count = c < columns ? depth - d : 0;
      lower[c] = load_up_to(column, count);
      upper[c] = load_up_to(column + kLanes, count - kLanes);
    }
    transpose(lower);
    transpose(upper);
    for (int64_t i = 0; i < kTileSide; ++i) store_split<Terms>(to, i, lower[i], upper[i], range);
  }
}

// A strip of the right operand: `columns` of up to 16 columns of [depth, stride].
template <int Terms = kFloat32Terms, typename T>
void split_down(uint32_t* to, const T* from, int64_t stride, int64_t depth, int64_t columns, Range& range) {
  if constexpr (Terms == 1) return copy_down(to, from, stride, depth, columns, range);
  for (int64_t d = 0; d < depth; d += kTileDepth, to += step_words(Terms)) {
    for (int64_t i = 0; i < kTileSide; ++i) {
      const T *lower = from + (d + i) * stride, *upper = lower + kTileSide * stride;
      store_split<Terms>(to, i, load_up_to(lower, d + i < depth ? columns : 0),
                         load_up_to(upper, d + i + kTileSide < depth ? columns : 0), range);
    }
  }
}

// Calls body(begin), ..., body(end - 1), spread evenly over `turns` calls of its own; rest() makes those that are left.
template <typename Body>
class Spread {
 public:
  Spread(const Body& body, int64_t begin, int64_t end, int64_t turns)
      : body_(body), next_(begin), end_(end), pieces_(end - begin), turns_(turns) {}

  GAFEXT_INLINE void operator()() {
    for (credit_ += pieces_; credit_ >= turns_; credit_ -= turns_) body_(next_++);
  }
  void rest() {
    while (next_ < end_) body_(next_++);
  }

 private:
  const Body& body_;
  int64_t next_;
  const int64_t end_, pieces_, turns_;
  int64_t credit_ = 0;
};

// The terms of a strip and, `stride` words further, of the next one.
struct Strips {
  const uint32_t* words;
  int64_t stride;

  GAFEXT_INLINE void advance(int64_t tile_words) { words += tile_words; }
};

// Strips whose tile i is whole, `offsets[i]` words beyond the strip's first.
struct ScatteredStrips {
  const uint32_t* first;
  int64_t stride;
  const int64_t* offsets;
  const uint32_t* words = first + *offsets;

  GAFEXT_INLINE void advance(int64_t) { words = first + *++offsets; }
};

// What tiles multiply: tile kSums += a left tile times a right one. The intrinsics are macros that want the tiles
// spelled out.
struct Bfloat16Tiles {
  using Sum = float;
  template <int kSums>
  static GAFEXT_INLINE void multiply() {
    if constexpr (kSums == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kSums == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSums == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kSums == 3) _tile_dpbf16ps(3, 5, 7);
  }
};
struct Int8Tiles {  // signed
  using Sum = int32_t;
  template <int kSums>
  static GAFEXT_INLINE void multiply() {
    if constexpr (kSums == 0) _tile_dpbssd(0, 4, 6);
    if constexpr (kSums == 1) _tile_dpbssd(1, 4, 7);
    if constexpr (kSums == 2) _tile_dpbssd(2, 5, 6);
    if constexpr (kSums == 3) _tile_dpbssd(3, 5, 7);
  }
};

struct UnsignedTiles {  // the left ones; the right ones are signed
  using Sum = int32_t;
  template <int kSums>
  static GAFEXT_INLINE void multiply() {
    if constexpr (kSums == 0) _tile_dpbusd(0, 4, 6);
    if constexpr (kSums == 1) _tile_dpbusd(1, 4, 7);
    if constexpr (kSums == 2) _tile_dpbusd(2, 5, 6);
    if constexpr (kSums == 3) _tile_dpbusd(3, 5, 7);
  }
};

// Products of two strips by `Columns`, [kBlock, kBlock] each, one after the other. The tiles of one are stored between
// the first products of the next: stored at its end, they would hold up the loads and products that follow, for 60 to
// 100 cycles.
template <int Terms, typename Tiles = Bfloat16Tiles>
class TermProducts {
 public:
  using Sum = typename Tiles::Sum;
  static constexpr int64_t kTurns = Terms * (Terms + 1) / 2;  // calls of vector_work() per step

  // to = the product, but not before the next call or finish(); of one column strip, its right half is zeros. Work in
  // vector_work(), between tile products, takes no time of its own as long as it is the shorter part.
  //
  // A turn multiplies one term of the left by one of the right, of which it loads the one that is new, the first both:
  //
  //   turn, Terms = 3   1     2     3     4     5     6        Terms = 2   1     2     3
  //   left              hi    hi    mid   mid   lo    hi                   hi    hi    mid
  //   right             lo    mid   mid   hi    hi    hi                   mid   hi    hi
  template <int Columns, typename Left = Strips, typename VectorWork>
  GAFEXT_INLINE void multiply(Left left, Strips right, int64_t steps, Sum* to, int64_t to_stride,
                              VectorWork& vector_work) {
    __asm__ volatile("" ::: "memory");  // the tile loads of GCC 12 do not say that they read memory
    const auto load_left = [&](int term) __attribute__((always_inline)) {
      _tile_loadd(4, left.words + term * kTileWords, 64);
      _tile_loadd(5, left.words + left.stride + term * kTileWords, 64);
    };
    const auto load_right = [&](int term) __attribute__((always_inline)) {
      _tile_stream_loadd(6, right.words + term * kTileWords, 64);
      if constexpr (Columns == 2) _tile_stream_loadd(7, right.words + right.stride + term * kTileWords, 64);
    };
    const auto add_products = []() __attribute__((always_inline)) {
      Tiles::template multiply<0>();
      if constexpr (Columns == 2) Tiles::template multiply<1>();
      Tiles::template multiply<2>();
      if constexpr (Columns == 2) Tiles::template multiply<3>();
    };
    load_left(0), load_right(Terms - 1), store_and_begin<Columns>();
    for (int64_t step = 1;; ++step) {
      vector_work();
      if constexpr (Terms == 2) {
        load_right(0), add_products(), vector_work();
        load_left(1), add_products(), vector_work();
      }
      if constexpr (Terms == 3) {
        load_right(1), add_products(), vector_work();
        load_left(1), add_products(), vector_work();
        load_right(0), add_products(), vector_work();
        load_left(2), add_products(), vector_work();
        load_left(0), add_products(), vector_work();
      }
      if (step == steps) break;
      left.advance(step_words(Terms)), right.advance(step_words(Terms));
      load_left(0), load_right(Terms - 1), add_products();
    }
    unsaved_ = to;
    line_ = to_stride;
  }

  void finish() {
    if (unsaved_ == nullptr) return;
    const int64_t bytes = line_ * static_cast<int64_t>(sizeof(Sum));
    _tile_stored(0, unsaved_, bytes);
    _tile_stored(1, unsaved_ + kTileSide, bytes);
    _tile_stored(2, unsaved_ + kTileSide * line_, bytes);
    _tile_stored(3, unsaved_ + kTileSide * line_ + kTileSide, bytes);
    unsaved_ = nullptr;
  }

 private:
  // The first turn of a product, between whose instructions the tiles of the one before are stored. Where there was
  // none, the tiles' old content goes to nothing_.
  template <int Columns>
  GAFEXT_INLINE void store_and_begin() {
    Sum* const to = unsaved_ == nullptr ? nothing_ : unsaved_;
    const int64_t line = unsaved_ == nullptr ? kBlock : line_, bytes = line * static_cast<int64_t>(sizeof(Sum));
    _tile_stored(0, to, bytes);
    _tile_zero(0);
    Tiles::template multiply<0>();
    _tile_stored(1, to + kTileSide, bytes);
    _tile_zero(1);
    if constexpr (Columns == 2) Tiles::template multiply<1>();
    _tile_stored(2, to + kTileSide * line, bytes);
    _tile_zero(2);
    Tiles::template multiply<2>();
    _tile_stored(3, to + kTileSide * line + kTileSide, bytes);
    _tile_zero(3);
    if constexpr (Columns == 2) Tiles::template multiply<3>();
  }
  alignas(64) Sum nothing_[kBlock * kBlock];
  Sum* unsaved_ = nullptr;
  int64_t line_ = 0;
};

}  // namespace gafext::GAFEXT_ISA
#endif
