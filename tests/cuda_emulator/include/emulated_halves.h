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
  operator float() const { return Format::widen(bits); }
};

}  // namespace emulated_halves

// The types themselves can't be here: argument-dependent lookup would search the namespace for what kernels call.
namespace emulator {
using emulated_halves::BFloat16, emulated_halves::Float16;
}  // namespace emulator

using __half = emulated_halves::Narrow<emulated_halves::Float16>;
using __nv_bfloat16 = emulated_halves::Narrow<emulated_halves::BFloat16>;

inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
