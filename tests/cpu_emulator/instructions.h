// AVX-512 and AMX for a processor with AVX2: tests/emulated_cpu.py includes this before each kernel.
//
// The compiler itself computes vectors of 64 bytes, in halves. What kernels call by name of the larger instruction sets
// is here in plain C++; what they write in assembly has a plain form beside it, which GAFEXT_EMULATOR selects. A use of
// tiles that a processor would refuse ends the process.
#pragma once

#include <immintrin.h>  // as AVX2 has it: before the macros of AVX-512
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __AVX512F__ 1
#ifdef GAFEXT_EMULATED_AMX
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#endif

extern "C" __attribute__((visibility("default"))) int64_t emulated_tile_products;

namespace emulated {

typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

template <typename To, typename From>
inline To as(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline __m512i set1_epi32(int x) { return as<__m512i>(x - Ints{}); }
inline __m512i cvtepi8_epi32(__m128i x) { return as<__m512i>(__builtin_convertvector(as<Bytes>(x), Ints)); }
inline __m512i cvtepu16_epi32(__m256i x) { return as<__m512i>(__builtin_convertvector(as<Halves>(x), Ints)); }
inline __m512 cvtepi32_ps(__m512i x) { return as<__m512>(__builtin_convertvector(as<Ints>(x), Floats)); }

inline __m512 cvtph_ps(__m256i x) {
  __m128i halves[2];
  memcpy(halves, &x, sizeof(x));
  const __m256 floats[2] = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
  __m512 out;
  memcpy(&out, floats, sizeof(out));
  return out;
}

inline __m256i to_nearest_halves(__m512 x) {
  __m256 floats[2];
  memcpy(floats, &x, sizeof(x));
  const __m128i halves[2] = {_mm256_cvtps_ph(floats[0], _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(floats[1], _MM_FROUND_TO_NEAREST_INT)};
  __m256i out;
  memcpy(&out, halves, sizeof(out));
  return out;
}

inline __m512 minus_floor(__m512 x) {
  Floats v = as<Floats>(x);
  for (int i = 0; i < 16; ++i) v[i] = isinf(v[i]) ? 0.0f : v[i] - floorf(v[i]);
  return as<__m512>(v);
}

inline __m512 sqrt_ps(__m512 x) {
  Floats v = as<Floats>(x);
  for (int i = 0; i < 16; ++i) v[i] = sqrtf(v[i]);
  return as<__m512>(v);
}

// x 2^floor(y)
inline __m512 scalef_ps(__m512 x, __m512 y) {
  Floats v = as<Floats>(x), by = as<Floats>(y);
  for (int i = 0; i < 16; ++i) {
    const float whole = fminf(fmaxf(floorf(by[i]), -1000.0f), 1000.0f);
    v[i] = isnan(by[i]) ? by[i] : ldexpf(v[i], static_cast<int>(whole));
  }
  return as<__m512>(v);
}

template <typename V>
inline V maskz_loadu_epi16(uint64_t wanted, const void* from) {
  uint16_t numbers[sizeof(V) / 2] = {};
  for (unsigned i = 0; i < sizeof(V) / 2; ++i) {
    if (wanted >> i & 1) memcpy(numbers + i, static_cast<const char*>(from) + 2 * i, 2);
  }
  V out;
  memcpy(&out, numbers, sizeof(out));
  return out;
}

// A thread's tiles, as LDTILECFG shapes them.
struct Tiles {
  int lines[8], line_bytes[8];
  alignas(64) uint8_t bytes[8][16][64];
  bool are_configured;
};
inline thread_local Tiles tiles;

inline void require(bool allowed, const char* otherwise) {
  if (allowed) return;
  fprintf(stderr, "emulated tiles: %s\n", otherwise);
  abort();
}

inline void tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  require(bytes[0] == 1, "expected palette 1");
  for (int i = 1; i < 16; ++i) require(bytes[i] == 0, "expected no start line and zeros after it");
  tiles = {};
  for (int t = 0; t < 8; ++t) {
    tiles.line_bytes[t] = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8;
    tiles.lines[t] = bytes[48 + t];
    require(tiles.line_bytes[t] <= 64 && tiles.lines[t] <= 16, "expected at most 16 lines of 64 bytes");
  }
  tiles.are_configured = true;
}

inline void tile_release() { tiles = {}; }

inline void tile_zero(int t) {
  require(tiles.are_configured, "used before they are configured");
  memset(tiles.bytes[t], 0, sizeof(tiles.bytes[t]));
}

inline void tile_loadd(int t, const void* base, int64_t stride) {
  tile_zero(t);
  for (int i = 0; i < tiles.lines[t]; ++i)
    memcpy(tiles.bytes[t][i], static_cast<const char*>(base) + i * stride, tiles.line_bytes[t]);
}

inline void tile_stored(int t, void* base, int64_t stride) {
  require(tiles.are_configured, "used before they are configured");
  for (int i = 0; i < tiles.lines[t]; ++i)
    memcpy(static_cast<char*>(base) + i * stride, tiles.bytes[t][i], tiles.line_bytes[t]);
}

// sums[m][n] += the product of the words left[m][k] and right[k][n], for every k: line by line, add_line(sums of line m,
// a word, the words of line k).
template <typename Sum, typename AddLine>
inline void multiply(int sums, int left, int right, const AddLine& add_line) {
  require(tiles.are_configured, "used before they are configured");
  require(sums != left && sums != right && left != right, "expected three different tiles");
  require(tiles.lines[sums] == tiles.lines[left] && tiles.line_bytes[sums] == tiles.line_bytes[right] &&
              tiles.line_bytes[left] == 4 * tiles.lines[right],
          "expected shapes [m, n], [m, k] and [k, n]");
  for (int m = 0; m < tiles.lines[left]; ++m) {
    Sum line[16];
    uint32_t words[16];
    memcpy(line, tiles.bytes[sums][m], sizeof(line));
    memcpy(words, tiles.bytes[left][m], sizeof(words));
    add_line(line, words, tiles.bytes[right], tiles.lines[right]);
    memcpy(tiles.bytes[sums][m], line, tiles.line_bytes[sums]);
  }
  __atomic_fetch_add(&emulated_tile_products, 1, __ATOMIC_RELAXED);
}

template <typename Left, typename Right>
inline void multiply_bytes(int sums, int left, int right) {
  multiply<int32_t>(sums, left, right, [](int32_t* line, const uint32_t* words, const uint8_t (*lines)[64], int count) {
    for (int k = 0; k < count; ++k) {
      int32_t by[16];
      memcpy(by, lines[k], sizeof(by));
      for (int byte = 0; byte < 32; byte += 8) {
        const int32_t number = static_cast<Left>(words[k] >> byte);
        for (int n = 0; n < 16; ++n) line[n] += number * static_cast<Right>(by[n] >> byte);
      }
    }
  });
}

// Subnormal numbers count as zeros.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float bfloat16(uint32_t bits) { return flushed(as<float>(bits << 16)); }

inline void tile_dpbf16ps(int sums, int left, int right) {
  multiply<float>(sums, left, right, [](float* line, const uint32_t* words, const uint8_t (*lines)[64], int count) {
    float lower[16] = {}, upper[16] = {};
    for (int k = 0; k < count; ++k) {
      uint32_t by[16];
      memcpy(by, lines[k], sizeof(by));
      const float a = bfloat16(words[k] & 0xffff), b = bfloat16(words[k] >> 16);
      for (int n = 0; n < 16; ++n) lower[n] = flushed(lower[n] + a * bfloat16(by[n] & 0xffff));
      for (int n = 0; n < 16; ++n) upper[n] = flushed(upper[n] + b * bfloat16(by[n] >> 16));
    }
    for (int n = 0; n < 16; ++n) line[n] = flushed(flushed(line[n]) + flushed(lower[n] + upper[n]));
  });
}

}  // namespace emulated

#undef _mm512_reduce_ps
#undef _mm512_cvtps_ph
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(x, rounding) emulated::to_nearest_halves(x)
#define _mm512_reduce_ps(x, how) (emulated::require((how) == 1, "expected 1 of reduce_ps"), emulated::minus_floor(x))
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_sqrt_ps emulated::sqrt_ps
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16<__m512i>
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16<__m256i>

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_loadd emulated::tile_loadd
#define _tile_stream_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_zero emulated::tile_zero
#define _tile_dpbssd emulated::multiply_bytes<int8_t, int8_t>
#define _tile_dpbsud emulated::multiply_bytes<int8_t, uint8_t>
#define _tile_dpbusd emulated::multiply_bytes<uint8_t, int8_t>
#define _tile_dpbuud emulated::multiply_bytes<uint8_t, uint8_t>
#define _tile_dpbf16ps emulated::tile_dpbf16ps
