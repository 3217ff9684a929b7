// Products of bfloat16, two in one instruction: vpdpbf16ps of AVX512_BF16, which AMD's processors run at the rate of
// float32's multiply-add, so at twice its products (Intel's do not, and have tiles).
//
// As integers.h's, operands are arrays of 32-bit words that hold the next two numbers of what is summed over. Sums are
// float32; subnormal numbers count as zeros. Inline assembly, because the copy for AVX-512 is for processors without it
// too; but for the emulator of tests/emulated_cpu.py.
#pragma once

#include "integers.h"

#if defined(__AVX512F__) && defined(GAFEXT_BFLOAT16_PAIRS) && !defined(__AMX_BF16__)
#define GAFEXT_HAS_PAIRS
#endif

#if defined(GAFEXT_HAS_PAIRS)
namespace gafext::GAFEXT_ISA {
namespace {

// sum += the products of a's and b's numbers, word by word.
GAFEXT_INLINE void add_pairs(Vec& sum, BitVec a, BitVec b) {
#if defined(GAFEXT_EMULATOR)
  const auto flushed = [](Vec v) { return (v < 0.0f ? -v : v) < 0x1p-126f ? Vec{} : v; };
  const auto add = [&](BitVec left, BitVec right) {
    sum = flushed(flushed(sum) + flushed(bit_cast<Vec>(left)) * flushed(bit_cast<Vec>(right)));
  };
  add(a << 16, b << 16);
  add(a & 0xffff0000, b & 0xffff0000);
#else
  __asm__("vdpbf16ps %[b], %[a], %[sum]" : [sum] "+v"(sum) : [a] "v"(a), [b] "v"(b));
#endif
}

// kLanes numbers, rounded.
GAFEXT_INLINE void store_rounded_pairs(uint16_t* to, Vec v) {
#if defined(GAFEXT_EMULATOR)
  store(reinterpret_cast<BFloat16*>(to), v);
#else
  __m256i numbers;
  __asm__("vcvtneps2bf16 %[v], %[numbers]" : [numbers] "=v"(numbers) : [v] "v"(v));
  __builtin_memcpy(to, &numbers, sizeof(numbers));
#endif
}

// Words of the first `count` numbers; what is missing is zero.
GAFEXT_INLINE BitVec load_words_up_to(const BFloat16* from, int64_t count) {
  if (count >= 2 * kLanes) return load_bits<BitVec>(from);
  BitVec words{};
  if (count > 0) __builtin_memcpy(&words, from, count * sizeof(BFloat16));
  return words;
}

// to[word * stride + row] = word `word` of row `row`, of `rows` <= kLanes rows of `count` numbers; the other lanes are
// zero.
GAFEXT_INLINE void transpose_words(uint32_t* to, int64_t stride, const BFloat16* from, int64_t from_stride,
                                   int64_t rows, int64_t count) {
  const int64_t words = ceil_div(count, 2);
  for (int64_t w = 0; w < words; w += kLanes) {
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      block[i] = i < rows ? bit_cast<Vec>(load_words_up_to(from + i * from_stride + 2 * w, count - 2 * w)) : Vec{};
    }
    transpose(block);
    for (int64_t i = 0; i < min_of(kLanes, words - w); ++i) {
      store(reinterpret_cast<float*>(to + (w + i) * stride), block[i]);
    }
  }
}

// kLanes words of the numbers of two rows.
GAFEXT_INLINE BitVec zip_rows(const BFloat16* low, const BFloat16* high, int64_t count) {
  const auto widened = [&](const BFloat16* from) { return bit_cast<BitVec>(load_up_to(from, count)); };
  return widened(low) >> 16 | (high == nullptr ? BitVec{} : widened(high));
}

// The largest magnitudes so far, lane by lane, as numbers in the words' upper halves.
GAFEXT_INLINE BitVec largest_pair(BitVec largest, BitVec words) {
  constexpr uint32_t kMagnitude = 0x7fff0000;
  const BitVec high = words & kMagnitude, low = (words << 16) & kMagnitude, more = high > low ? high : low;
  return more > largest ? more : largest;
}

// Whether they are all zero, or one is so large that products which count beside it are normal numbers.
GAFEXT_INLINE bool products_are_normal(BitVec largest) {
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
  return bits == 0 || bits >= bit_cast<uint32_t>(0x1p-60f);
}

}  // namespace
}  // namespace gafext::GAFEXT_ISA
#endif
