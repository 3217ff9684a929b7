// The vector that the CPU kernels are written in: kLanes float32, with GCC's and clang's vector extensions.
//
// Every kernel source is compiled once for each instruction set, with GAFEXT_ISA naming it (portable, avx2, avx512,
// amx, neon); the width follows from the compiler's flags. Everything lives in the namespace of that name, and nothing here
// or in the kernels instantiates a std:: template: the linker merges inline functions of one name, and could keep the
// copy with AVX-512 code for all processors.
#pragma once

#include <cstdint>
#include <cstring>

#include "../types.h"
#include "runtime.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define GAFEXT_INLINE inline __attribute__((always_inline))
#define GAFEXT_UNROLL _Pragma("GCC unroll 16")

namespace gafext::GAFEXT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// A register tile is kTileRows x kTileVectors accumulators, a vector of the right-hand side each and a broadcast: 29 of
// the 32 registers of AVX-512 or NEON, 15 of the 16 of AVX2 or SSE.
constexpr int kTileRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Loads and stores: float32 in registers, whatever the memory holds.

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
GAFEXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V>
GAFEXT_INLINE V load_bits(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

GAFEXT_INLINE Vec broadcast(float x) { return x - Vec{}; }

GAFEXT_INLINE Vec load(const float* from) { return load_bits<Vec>(from); }

GAFEXT_INLINE Vec load(const BFloat16* from) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(bit_cast<BitVec>(_mm512_cvtepu16_epi32(load_bits<__m256i>(from))) << 16);  // GCC 12: 2 halves
#elif defined(__AVX2__)
  return bit_cast<Vec>(bit_cast<BitVec>(_mm256_cvtepu16_epi32(load_bits<__m128i>(from))) << 16);
#elif defined(__aarch64__)
  return bit_cast<Vec>(vshll_n_u16(load_bits<uint16x4_t>(from), 16));
#else
  return bit_cast<Vec>(__builtin_convertvector(load_bits<HalfBits>(from), BitVec) << 16);
#endif
}

GAFEXT_INLINE Vec load(const Float16* from) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_cvtph_ps(load_bits<__m256i>(from)));
#elif defined(__F16C__)
  return bit_cast<Vec>(_mm256_cvtph_ps(load_bits<__m128i>(from)));
#elif defined(__aarch64__)
  return bit_cast<Vec>(vcvt_f32_f16(load_bits<float16x4_t>(from)));
#else
  const BitVec half = __builtin_convertvector(load_bits<HalfBits>(from), BitVec);
  const BitVec magnitude = (half & 0x7fff) << 13;
  const BitVec finite = bit_cast<BitVec>(bit_cast<Vec>(magnitude) * 0x1p112f);  // moves the exponent's bias
  const BitVec special = BitVec(magnitude >= (0x7c00u << 13)) & 0x7f800000;     // infinity and NaN
  return bit_cast<Vec>(finite | special | ((half & 0x8000) << 16));
#endif
}

GAFEXT_INLINE Vec load(const int8_t* from) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bits<__m128i>(from))));
#elif defined(__AVX2__)
  return bit_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(from))));
#elif defined(__aarch64__)
  const int16x8_t wide = vmovl_s8(vcreate_s8(load_bits<uint32_t>(from)));
  return bit_cast<Vec>(vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))));
#else
  return Vec{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
#endif
}

// Fetches a line of memory for writing: after a prefetch for reading, the store would have to request it again. In
// attention that is 1 to 5% of the time with 77 keys.
GAFEXT_INLINE void prefetch_to_write(const void* line) {
#if defined(__AVX512F__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(line)));  // compilers write it only with -mprfchw
#else
  __builtin_prefetch(line, 1, 2);
#endif
}

GAFEXT_INLINE void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof(v)); }

GAFEXT_INLINE void store(BFloat16* to, Vec v) {
  const BitVec bits = bit_cast<BitVec>(v);
  const BitVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const BitVec is_nan = BitVec(v != v);
  const HalfBits out = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), HalfBits);
  __builtin_memcpy(to, &out, sizeof(out));
}

GAFEXT_INLINE void store(Float16* to, Vec v) {
#if defined(__AVX512F__)
  const __m256i out = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  const __m128i out = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  const float16x4_t out = vcvt_f16_f32(bit_cast<float32x4_t>(v));
#else
  const BitVec bits = bit_cast<BitVec>(v), magnitude = bits & 0x7fffffff;
  const BitVec normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 puts the unit of a subnormal half, 2^-24, at the last bit of the float.
  const BitVec subnormal = bit_cast<BitVec>(bit_cast<Vec>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const BitVec is_subnormal = BitVec(magnitude < (113u << 23)), is_huge = BitVec(magnitude >= (143u << 23));
  const BitVec is_nan = BitVec(magnitude > 0x7f800000u);
  const BitVec finite = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  const BitVec half = (finite & ~is_huge) | (0x7c00 & is_huge) | (0x0200 & is_nan);
  const HalfBits out = __builtin_convertvector(half | ((bits >> 16) & 0x8000), HalfBits);
#endif
  __builtin_memcpy(to, &out, sizeof(out));
}

// The first `count` lanes only; the others read as zero and are not written.
template <typename T>
GAFEXT_INLINE Vec load_first(const T* from, int64_t count) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <typename T>
GAFEXT_INLINE void store_first(T* to, Vec v, int64_t count) {
  T padded[kLanes];
  store(padded, v);
  __builtin_memcpy(to, padded, count * sizeof(T));
}

// What is missing is zero.
template <typename T>
GAFEXT_INLINE Vec load_up_to(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : count > 0 ? load_first(from, count) : Vec{};
}

template <typename T>
GAFEXT_INLINE void store_up_to(T* to, Vec v, int64_t count) {
  if (count >= kLanes) {
    store(to, v);
  } else if (count > 0) {
    store_first(to, v, count);
  }
}

// `count` elements to float32 times `factor`, zeros up to the next whole vector.
template <typename T>
GAFEXT_INLINE void copy_row(float* to, const T* from, int64_t count, float factor = 1.0f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i) * factor);
  if (i < count) store(to + i, load_first(from + i, count - i) * factor);
}

GAFEXT_INLINE Vec max_of(Vec a, Vec b) { return a > b ? a : b; }

GAFEXT_INLINE Vec sqrt_of(Vec x) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_sqrt_ps(bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast<Vec>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#elif defined(__aarch64__)
  return bit_cast<Vec>(vsqrtq_f32(bit_cast<float32x4_t>(x)));
#else
  return Vec{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
#endif
}

// 2^x for x <= 128: a polynomial over the fraction (minimax with 2^0 = 1 exactly, relative error 1.4e-7), the whole part
// into the exponent. Below -126 it is subnormal with AVX-512 and 0 without, at -infinity 0, at 128 infinity; NaN stays
// NaN.
GAFEXT_INLINE Vec exp2_of(Vec x) {
#if defined(__AVX512F__)
  const Vec fraction = bit_cast<Vec>(_mm512_reduce_ps(bit_cast<__m512>(x), 0x01));  // x - floor(x)
#else
  x = x < -127.0f ? broadcast(-127.0f) : x;
#if defined(__aarch64__)
  const IntVec whole = bit_cast<IntVec>(vcvtmq_s32_f32(bit_cast<float32x4_t>(x)));
#else
  IntVec whole = __builtin_convertvector(x, IntVec);
  whole += IntVec(__builtin_convertvector(whole, Vec) > x);  // towards zero to floor: a true comparison is -1
#endif
  const Vec fraction = x - __builtin_convertvector(whole, Vec);
#endif
  Vec p = broadcast(0.0018671312f);
  p = p * fraction + 0.009017028f;
  p = p * fraction + 0.055799916f;
  p = p * fraction + 0.24016444f;
  p = p * fraction + 0.6931513f;
  p = p * fraction + 1.0f;
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(x)));
#else
  return p * bit_cast<Vec>((whole + 127) << 23);
#endif
}

// erfc(a / sqrt 2) / 2 for a >= 0, the normal distribution's tail beyond a, as 2^Q(a). Q is fitted so that the absolute
// error of a 2^Q(a) stays below 1e-8; beyond 14 it is 0.
GAFEXT_INLINE Vec normal_tail(Vec magnitude) {
  const Vec a = magnitude > 16.0f ? broadcast(16.0f) : magnitude;
  Vec q = broadcast(-1.6903895e-06f);
  q = q * a + 2.508314e-05f;
  q = q * a - 0.00011446175f;
  q = q * a - 0.00032334484f;
  q = q * a + 0.0073333886f;
  q = q * a - 0.052714203f;
  q = q * a - 0.45911545f;
  q = q * a - 1.1511233f;
  q = q * a - 0.99999887f;
  return exp2_of(q);
}

// gelu(g) = g/2 (1 + erf(g / sqrt 2)) = max(g, 0) - |g| tail(|g|). At -infinity it is infinity times 0, NaN, as in
// PyTorch's gelu.
GAFEXT_INLINE Vec gelu_of(Vec gate) {
  const Vec capped = gate > 16.0f ? broadcast(16.0f) : gate;
  const Vec magnitude = capped < 0.0f ? -capped : capped;
  return (gate > 0.0f ? gate : Vec{}) - magnitude * normal_tail(magnitude);
}

// 0, 1, ..., kLanes - 1 as template arguments, for the shuffles. (std::integer_sequence is a std:: template.)
template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I>
struct CountLanes<0, I...> {
  using type = Lanes<I...>;
};
using AllLanes = CountLanes<kLanes>::type;

template <int... I>
GAFEXT_INLINE IntVec lane_numbers(Lanes<I...>) {
  return IntVec{I...};
}

// Lane i of the result is lane Pick(i) of (a, b), counted through both.
#if defined(__clang__)
#define GAFEXT_SHUFFLE(a, b, pick) __builtin_shufflevector(a, b, pick...)
#else
#define GAFEXT_SHUFFLE(a, b, pick) __builtin_shuffle(a, b, IntVec{pick...})
#endif

// a0 b0 a1 b1 ... of the lower halves, and of the upper halves.
template <int... I>
GAFEXT_INLINE Vec zip_low(Vec a, Vec b, Lanes<I...>) {
  return GAFEXT_SHUFFLE(a, b, (I / 2 + I % 2 * kLanes));
}
template <int... I>
GAFEXT_INLINE Vec zip_high(Vec a, Vec b, Lanes<I...>) {
  return GAFEXT_SHUFFLE(a, b, (I / 2 + I % 2 * kLanes + kLanes / 2));
}
template <int Distance, int... I>
GAFEXT_INLINE Vec rotate(Vec a, Lanes<I...>) {
  return GAFEXT_SHUFFLE(a, a, ((I + Distance) % kLanes));
}

// Transposes kLanes x kLanes: log2(kLanes) rounds of a perfect shuffle of the rows.
GAFEXT_INLINE void transpose(Vec (&rows)[kLanes]) {
  for (int round = 1; round < kLanes; round *= 2) {
    Vec zipped[kLanes];
    GAFEXT_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = zip_low(rows[i], rows[i + kLanes / 2], AllLanes());
      zipped[2 * i + 1] = zip_high(rows[i], rows[i + kLanes / 2], AllLanes());
    }
    GAFEXT_UNROLL
    for (int i = 0; i < kLanes; ++i) rows[i] = zipped[i];
  }
}

// Lane i of the result: of `a` if i lacks the bit kBit, else of `b`, the sum of the lanes i and i ^ kBit.
template <int kBit, int... I>
GAFEXT_INLINE Vec sum_pairs(Vec a, Vec b, Lanes<I...>) {
  return GAFEXT_SHUFFLE(a, b, (I & kBit ? I + kLanes : I)) +
         GAFEXT_SHUFFLE(a, b, ((I ^ kBit) + (I & kBit ? kLanes : 0)));
}

// Lane i of the result is the sum of the lanes of rows[i]: log2(kLanes) rounds that halve the rows.
template <int kBit = kLanes / 2>
GAFEXT_INLINE Vec sums_of(Vec (&rows)[kLanes]) {
#if defined(__aarch64__)
  const auto add_pairs = [](auto a, auto b) __attribute__((always_inline)) {
    return vpaddq_f32(bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b));
  };
  return bit_cast<Vec>(add_pairs(add_pairs(rows[0], rows[1]), add_pairs(rows[2], rows[3])));
#else
  GAFEXT_UNROLL
  for (int i = 0; i < kBit; ++i) rows[i] = sum_pairs<kBit>(rows[i], rows[i + kBit], AllLanes());
  if constexpr (kBit > 1) {
    return sums_of<kBit / 2>(rows);
  } else {
    return rows[0];
  }
#endif
}

// One number out of all lanes, by folding the vector in halves.
template <typename Fold>
GAFEXT_INLINE float reduce(Vec v, Fold fold) {
  if constexpr (kLanes > 8) v = fold(v, rotate<8 % kLanes>(v, AllLanes()));
  if constexpr (kLanes > 4) v = fold(v, rotate<4 % kLanes>(v, AllLanes()));
  v = fold(v, rotate<2>(v, AllLanes()));
  return fold(v, rotate<1>(v, AllLanes()))[0];
}
GAFEXT_INLINE float max_in(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return max_of(a, b); });
}
GAFEXT_INLINE float sum_in(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return a + b; });
}

// to[column * stride + row] = from[row * from_stride + column] for `rows` <= kLanes rows; the other lanes are zero.
template <typename T>
GAFEXT_INLINE void transpose_rows(float* to, int64_t stride, const T* from, int64_t from_stride, int64_t rows,
                                  int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t width = min_of(kLanes, columns - c);
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const T* row = from + i * from_stride + c;
      block[i] = i >= rows ? Vec{} : width == kLanes ? load(row) : load_first(row, width);
    }
    transpose(block);
    for (int64_t i = 0; i < width; ++i) store(to + (c + i) * stride, block[i]);
  }
}

// body(thread, unit) for every unit; thread < max_threads(). An exception must not leave `body`. All threads take part,
// even in few units: libgomp ends those that a smaller team leaves out, and starts them anew.
template <typename Body>
void parallel_for(int64_t units, const Body& body) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) if (units > 1)
  for (int64_t unit = 0; unit < units; ++unit) body(omp_get_thread_num(), unit);
#else
  for (int64_t unit = 0; unit < units; ++unit) body(0, unit);
#endif
}

// body(run) for every run < runs <= max_threads(), each always on the same thread: its caches may hold the same part of
// what came before.
template <typename Body>
void parallel_runs(int64_t runs, const Body& body) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) if (runs > 1)
#endif
  for (int64_t run = 0; run < runs; ++run) body(run);
}

// body(T()) with the element type that `dtype` names.
template <typename Body>
void with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kFloat16:
      return body(Float16());
    case DType::kBFloat16:
      return body(BFloat16());
  }
}

// body(thread, unit, next) for every unit, as parallel_for; `next` is the unit that this thread gets afterwards, so
// that its memory can be prefetched, and `unit` itself where there is none.
template <typename Body>
void parallel_for_ahead(int64_t units, const Body& body) {
#ifdef _OPENMP
  int64_t claimed = 0;
#pragma omp parallel if (units > 1)
  {
    int64_t unit = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED);
    while (unit < units) {
      const int64_t next = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED);
      body(omp_get_thread_num(), unit, next < units ? next : unit);
      unit = next;
    }
  }
#else
  for (int64_t unit = 0; unit < units; ++unit) body(0, unit, min_of(unit + 1, units - 1));
#endif
}

}  // namespace gafext::GAFEXT_ISA
