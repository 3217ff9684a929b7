// float16 and bfloat16 with CUDA's names. Arithmetic is done in float32 and rounded to nearest, ties to even, as CUDA's
// intrinsics do; the fused multiply-add in float64.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

namespace emulated_halves {

struct Float16 {
  static float widen(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // The exponent moved to its place is 112 too small; a product is right for denormals too.
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f));
  }
  static uint16_t narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return 0x7fff;          // NaN; CUDA's canonical one
    if (rest >= 0x477ff000u) return sign | 0x7c00;  // from 65520 on
    if (rest < 0x38800000u) {                       // denormal: the sum has them in its last bits, rounded
      return sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000u);
    }
    return sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13);
  }
};

struct BFloat16 {
  static float widen(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static uint16_t narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  }
};

template <typename Format>
struct Narrow {
  uint16_t bits;

  Narrow() = default;
  Narrow(float x) : bits(Format::narrow(x)) {}
  Narrow(double x) : Narrow(static_cast<float>(x)) {}
  Narrow(int x) : Narrow(static_cast<float>(x)) {}
  operator float() const { return Format::widen(bits); }
  static Narrow of_bits(uint16_t bits) {
    Narrow x;
    x.bits = bits;
    return x;
  }
  friend Narrow operator+(Narrow a, Narrow b) { return float(a) + float(b); }
  friend Narrow operator-(Narrow a, Narrow b) { return float(a) - float(b); }
  friend Narrow operator*(Narrow a, Narrow b) { return float(a) * float(b); }
  friend Narrow operator/(Narrow a, Narrow b) { return float(a) / float(b); }
  friend Narrow operator-(Narrow a) { return of_bits(a.bits ^ 0x8000); }
};
template <typename Format>
struct alignas(4) NarrowPair {
  Narrow<Format> x, y;
};

}  // namespace emulated_halves

// The types themselves can't be here: argument-dependent lookup would search the namespace for what kernels call.
namespace emulator {
using emulated_halves::BFloat16, emulated_halves::Float16;
}  // namespace emulator

using __half = emulated_halves::Narrow<emulated_halves::Float16>;
using __half2 = emulated_halves::NarrowPair<emulated_halves::Float16>;
using __nv_bfloat16 = emulated_halves::Narrow<emulated_halves::BFloat16>;
using __nv_bfloat162 = emulated_halves::NarrowPair<emulated_halves::BFloat16>;
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

// Those whose names say the format.
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 x) { return {x.x, x.y}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return __half::of_bits(bits); }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {x.x, x.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16::of_bits(bits); }

// Those that are named alike for both.
#define GAFEXT_HALVES(name, expression)                                                                        \
  template <typename F>                                                                                        \
  emulated_halves::Narrow<F> name(emulated_halves::Narrow<F> a, emulated_halves::Narrow<F> b) {                \
    return expression;                                                                                         \
  }                                                                                                            \
  template <typename F>                                                                                        \
  emulated_halves::NarrowPair<F> name##2(emulated_halves::NarrowPair<F> a, emulated_halves::NarrowPair<F> b) { \
    return {name(a.x, b.x), name(a.y, b.y)};                                                                   \
  }
GAFEXT_HALVES(__hadd, a + b)
GAFEXT_HALVES(__hsub, a - b)
GAFEXT_HALVES(__hmul, a* b)
GAFEXT_HALVES(__hmax, std::fmax(float(a), float(b)))
GAFEXT_HALVES(__hmin, std::fmin(float(a), float(b)))
#undef GAFEXT_HALVES
template <typename F>
emulated_halves::Narrow<F> __hfma(emulated_halves::Narrow<F> a, emulated_halves::Narrow<F> b,
                                  emulated_halves::Narrow<F> c) {
  return double(float(a)) * float(b) + float(c);
}
template <typename F>
emulated_halves::NarrowPair<F> __hfma2(emulated_halves::NarrowPair<F> a, emulated_halves::NarrowPair<F> b,
                                       emulated_halves::NarrowPair<F> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
template <typename F>
emulated_halves::Narrow<F> __low2half(emulated_halves::NarrowPair<F> x) {
  return x.x;
}
template <typename F>
emulated_halves::Narrow<F> __high2half(emulated_halves::NarrowPair<F> x) {
  return x.y;
}
template <typename F>
float __low2float(emulated_halves::NarrowPair<F> x) {
  return x.x;
}
template <typename F>
float __high2float(emulated_halves::NarrowPair<F> x) {
  return x.y;
}
