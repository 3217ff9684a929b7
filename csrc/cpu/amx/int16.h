// Products of 16-bit integers on AMX tiles (tiles.h), which multiply 8-bit ones:
//
//   a b = 2^16 a1 b1 + 2^8 (a1 b0 + a0 b1) + a0 b0,   a = 2^8 a1 + a0,  a1 signed, a0 unsigned
//
// Four tile products, exact modulo 2^32 as vpdpwssd's sums are: 256 multiply-adds a cycle, where AVX512_VNNI has 64.
// Tests emulate the instructions; this has not run on hardware.
#pragma once

#include "tiles.h"

#if defined(__AMX_INT8__)
namespace gafext::GAFEXT_ISA {

// Two vectors of words of two 16-bit numbers each become one of their upper bytes and one of their lower bytes.
GAFEXT_INLINE void separate_bytes(uint32_t* first, uint32_t* second) {
  constexpr uint32_t kLower = 0x00ff00ff;
  const BitVec a = load_bits<BitVec>(first), b = load_bits<BitVec>(second);
  const BitVec upper = ((a >> 8) & kLower) | (b & ~kLower), lower = (a & kLower) | ((b & kLower) << 8);
  __builtin_memcpy(first, &upper, sizeof(upper));
  __builtin_memcpy(second, &lower, sizeof(lower));
}

// Products [16, 16] of 64 numbers per row and column, one after the other: the sums of one are taken up while the next
// one is multiplied.
class Int16Products {
 public:
  // c = (or +=) a b, but not before the next call or finish(). Row i of a is 16 words of upper bytes, then 16 of lower
  // ones; b is 16 rows of words of upper bytes, then 16 of lower ones. Strides in words.
  GAFEXT_INLINE void multiply(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, float* c,
                              int64_t c_stride, bool accumulate) {
    __asm__ volatile("" ::: "memory");  // the tile loads of GCC 12 do not say that they read memory
    _tile_loadd(3, a, 4 * a_stride);
    _tile_loadd(4, a + kTileSide, 4 * a_stride);
    _tile_loadd(5, b, 4 * b_stride);
    _tile_loadd(6, b + kTileSide * b_stride, 4 * b_stride);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_dpbssd(0, 3, 5);
    _tile_dpbsud(1, 3, 6);
    _tile_dpbuud(2, 4, 6);
    _tile_dpbusd(1, 4, 5);
    finish();
    _tile_stored(0, sums_[0], 64);
    _tile_stored(1, sums_[1], 64);
    _tile_stored(2, sums_[2], 64);
    unsaved_ = c, stride_ = c_stride, accumulate_ = accumulate;
  }

  GAFEXT_INLINE void finish() {
    if (unsaved_ == nullptr) return;
    for (int64_t i = 0; i < kTileSide; ++i) {
      const auto line = [&](int plane) { return load_bits<BitVec>(sums_[plane] + i * kTileSide); };
      const BitVec bits = (line(0) << 16) + (line(1) << 8) + line(2);
      const Vec sum = __builtin_convertvector(bit_cast<IntVec>(bits), Vec);
      float* to = unsaved_ + i * stride_;
      store(to, accumulate_ ? load(to) + sum : sum);
    }
    unsaved_ = nullptr;
  }

 private:
  alignas(64) uint32_t sums_[3][kTileWords];  // of 2^16, 2^8 and 1
  float* unsaved_ = nullptr;
  int64_t stride_ = 0;
  bool accumulate_ = false;
};

}  // namespace gafext::GAFEXT_ISA
#endif
