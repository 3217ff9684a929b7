// Products of matrices of small integers, accumulated in 32 bits: what the instruction sets have for it.
//
// Both operands are arrays of 32-bit words; a word holds the next two 16-bit or four 8-bit numbers of what is summed
// over, and one instruction multiplies a word of the left with a vector of words of the right:
//
//   kPairs       two signed 16-bit numbers; vpmaddwd and vpaddd, with AVX2 on: 1.5 times float32's multiply-adds.
//                With NEON smull, smull2, addp and add: half of float32's
//   kPairsVnni   the same in one vpdpwssd, with AVX512_VNNI: twice float32's
//   kQuadsVnni   four numbers, unsigned 8-bit by signed 8-bit; one vpdpbusd, with AVX512_VNNI: 4 times float32's
//   kQuads       the same without the instruction, for the portable copy
//   kSignedQuads four signed 8-bit numbers each; one sdot, on Arm with FEAT_DotProd: 4 times float32's
//
// GCC 12 spills accumulators around the intrinsics of vpmaddwd, which costs a third; so these are inline assembly, but
// for the emulator of tests/emulated_cpu.py.
#pragma once

#include "vector.h"

namespace gafext::GAFEXT_ISA {

enum class Products { kPairs, kPairsVnni, kQuads, kQuadsVnni, kSignedQuads };

// Whether the left operand is unsigned, and so 128 too large.
constexpr bool is_shifted(Products products) {
  return products == Products::kQuads || products == Products::kQuadsVnni;
}
constexpr bool is_quads(Products products) { return is_shifted(products) || products == Products::kSignedQuads; }
constexpr int64_t per_word(Products products) { return is_quads(products) ? 4 : 2; }

typedef int16_t PairVec __attribute__((vector_size(4 * kLanes)));
typedef int8_t QuadVec __attribute__((vector_size(4 * kLanes)));

// The numbers of the left operand, and kLanes of them.
template <bool quads, bool shifted>
struct Left {
  using Number = int16_t;
  typedef int16_t Vector __attribute__((vector_size(2 * kLanes)));
};
template <>
struct Left<true, true> {
  using Number = uint8_t;
  typedef uint8_t Vector __attribute__((vector_size(kLanes)));
};
template <>
struct Left<true, false> {
  using Number = int8_t;
  typedef int8_t Vector __attribute__((vector_size(kLanes)));
};

GAFEXT_INLINE IntVec broadcast_word(const uint32_t* word) {
#if defined(__AVX512F__)
  return bit_cast<IntVec>(_mm512_set1_epi32(static_cast<int>(*word)));
#elif defined(__AVX2__)
  return bit_cast<IntVec>(_mm256_broadcast_ss(reinterpret_cast<const float*>(word)));
#else
  return static_cast<int32_t>(*word) - IntVec{};
#endif
}

// sum += the products of a's and b's numbers, word by word.
template <Products kind>
GAFEXT_INLINE void add_products(IntVec& sum, IntVec a, IntVec b) {
#if defined(__AVX512F__) && !defined(GAFEXT_EMULATOR)
  if constexpr (kind == Products::kQuadsVnni) {
    __asm__("vpdpbusd %[b], %[a], %[sum]" : [sum] "+v"(sum) : [a] "v"(a), [b] "v"(b));
    return;
  }
  if constexpr (kind == Products::kPairsVnni) {
    __asm__("vpdpwssd %[b], %[a], %[sum]" : [sum] "+v"(sum) : [a] "v"(a), [b] "v"(b));
    return;
  }
#endif
#if defined(__AVX2__) && !defined(GAFEXT_EMULATOR)
  if constexpr (kind == Products::kPairs) {
    IntVec product;
    __asm__("vpmaddwd %[b], %[a], %[product]\n\tvpaddd %[product], %[sum], %[sum]"
            : [sum] "+v"(sum), [product] "=&v"(product)
            : [a] "v"(a), [b] "v"(b));
    return;
  }
#endif
#if defined(__aarch64__)
  if constexpr (kind == Products::kSignedQuads) {
#if defined(__ARM_FEATURE_DOTPROD)
    sum = bit_cast<IntVec>(vdotq_s32(bit_cast<int32x4_t>(sum), bit_cast<int8x16_t>(a), bit_cast<int8x16_t>(b)));
#else  // this source is for processors without it too, so only the assembler may know of it
    __asm__(".arch armv8.2-a+dotprod\n\tsdot %[sum].4s, %[a].16b, %[b].16b" : [sum] "+w"(sum) : [a] "w"(a), [b] "w"(b));
#endif
    return;
  }
  if constexpr (kind == Products::kPairs) {
    const auto left = bit_cast<int16x8_t>(a), right = bit_cast<int16x8_t>(b);
    const int32x4_t low = vmull_s16(vget_low_s16(left), vget_low_s16(right)), high = vmull_high_s16(left, right);
    sum += bit_cast<IntVec>(vpaddq_s32(low, high));
    return;
  }
#endif
  // Unsigned, whose sums may wrap around: kernels compute whole register tiles, and some rows hold what nobody wrote.
  BitVec total = bit_cast<BitVec>(sum);
  const auto add = [&](IntVec left, IntVec right) { total += bit_cast<BitVec>(left) * bit_cast<BitVec>(right); };
  if constexpr (is_quads(kind)) {
    GAFEXT_UNROLL
    for (int byte = 0; byte < 32; byte += 8) add((a >> byte) & 0xff, (b << (24 - byte)) >> 24);
  } else {
    add((a << 16) >> 16, (b << 16) >> 16);
    add(a >> 16, b >> 16);
  }
  sum = bit_cast<IntVec>(total);
}

// tile[r, :] += sum over `words` of a[r, word] b[word, :], of kPanel columns.
template <Products kind, int Rows>
GAFEXT_INLINE void add_words(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t words,
                             IntVec (&tile)[Rows][kTileVectors]) {
  constexpr int64_t kColumns = kTileVectors * kLanes;
  for (int64_t w = 0; w < words; ++w) {
    IntVec row[kTileVectors];
    GAFEXT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) row[v] = load_bits<IntVec>(b + w * kColumns + v * kLanes);
    GAFEXT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const IntVec word = broadcast_word(a + r * a_stride + w);
      GAFEXT_UNROLL
      for (int v = 0; v < kTileVectors; ++v) add_products<kind>(tile[r][v], word, row[v]);
    }
  }
}

// What is missing is zero.
template <typename V>
GAFEXT_INLINE V load_bytes_up_to(const int8_t* from, int64_t count) {
  if (count >= static_cast<int64_t>(sizeof(V))) return load_bits<V>(from);
  V numbers{};
  if (count > 0) __builtin_memcpy(&numbers, from, count);
  return numbers;
}

// To the nearest integer, ties to even, of |x| < 2^22.
GAFEXT_INLINE IntVec round_to_int(Vec x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it moves the integer part to the lowest bits
  return bit_cast<IntVec>(x + kShift) - bit_cast<int32_t>(kShift);
}

// How a row is rounded: q = x factor, and q stands for q scale, with |q| <= 127. For a row with an infinity or
// NaN the scale is NaN, and so is the result.
struct RowScale {
  float scale, factor;

  template <typename T>
  RowScale(const T* x, int64_t count) {
    IntVec most{};  // of the magnitudes, as integers: NaN is above infinity
    const auto add = [&](Vec v) {
      const IntVec magnitude = bit_cast<IntVec>(v) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    };
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) add(load(x + c));
    if (c < count) add(load_first(x + c, count - c));
    int32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits = most[lane] > bits ? most[lane] : bits;
    const bool finite = bits < 0x7f800000;
    const float step = finite ? bit_cast<float>(bits) / 127.0f : 0.0f, usable = step < 0x1p-126f ? 0x1p-126f : step;
    scale = finite ? usable : __builtin_nanf("");
    factor = finite ? 1.0f / usable : 0.0f;
  }
};

}  // namespace gafext::GAFEXT_ISA
