// The inner loop of the kernels that multiply matrices: a register tile of kTileRows x kTileVectors accumulators.
#pragma once

#include "pairs.h"

namespace gafext::GAFEXT_ISA {

constexpr int64_t kPanel = kTileVectors * kLanes;  // columns of a packed right-hand side: [depth, kPanel]

// What a matrix holds: float, or words of two numbers of bfloat16 (pairs.h), which are multiplied with each other.
// `inline`, for Clang gives specializations external linkage, and several files include these.
template <typename Number>
inline constexpr bool kIsFloat = false;
template <>
inline constexpr bool kIsFloat<float> = true;

template <typename T>
inline constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;

template <typename Number>
struct Operand {
  using Vector = Vec;
  static GAFEXT_INLINE Vec of_one(float a) { return broadcast(a); }
  static GAFEXT_INLINE void multiply(Vec& sum, Vec a, Vec b) { sum += a * b; }
};

#if defined(GAFEXT_HAS_PAIRS)
template <>
struct Operand<uint32_t> {
  using Vector = BitVec;
  static GAFEXT_INLINE BitVec of_one(const uint32_t& a) { return bit_cast<BitVec>(broadcast_word(&a)); }
  static GAFEXT_INLINE void multiply(Vec& sum, BitVec a, BitVec b) { add_pairs(sum, a, b); }
};
#endif

// c[r, :] = (or +=) sum_k a[r, k] b[k, :] for `Rows` rows of a and c, and the first `Vectors` vectors of columns. What
// is there is added last: a sum of short sums rounds less than one long chain.
template <int Vectors, int Rows, typename Number>
void multiply_tile(const Number* a, int64_t a_stride, const Number* b, int64_t depth, float* c, int64_t c_stride,
                   bool accumulate) {
  Vec tile[Rows][Vectors] = {};
  using Of = Operand<Number>;
  using Vector = typename Of::Vector;
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[Vectors];
    GAFEXT_UNROLL
    for (int v = 0; v < Vectors; ++v) row[v] = load_bits<Vector>(b + k * kPanel + v * kLanes);
    GAFEXT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const Vector factor = Of::of_one(a[r * a_stride + k]);
      GAFEXT_UNROLL
      for (int v = 0; v < Vectors; ++v) Of::multiply(tile[r][v], factor, row[v]);
    }
  }
  GAFEXT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    float* row = c + r * c_stride;
    GAFEXT_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      store(row + v * kLanes, accumulate ? load(row + v * kLanes) + tile[r][v] : tile[r][v]);
    }
  }
}

// The same for `rows` <= kTileRows.
template <int Vectors = kTileVectors, typename Number>
void multiply_rows(int64_t rows, const Number* a, int64_t a_stride, const Number* b, int64_t depth, float* c,
                   int64_t c_stride, bool accumulate) {
  switch (rows) {
    case 1:
      return multiply_tile<Vectors, 1>(a, a_stride, b, depth, c, c_stride, accumulate);
    case 2:
      return multiply_tile<Vectors, 2>(a, a_stride, b, depth, c, c_stride, accumulate);
    case 3:
      return multiply_tile<Vectors, 3>(a, a_stride, b, depth, c, c_stride, accumulate);
    case 4:
      return multiply_tile<Vectors, 4>(a, a_stride, b, depth, c, c_stride, accumulate);
    case 5:
      return multiply_tile<Vectors, 5>(a, a_stride, b, depth, c, c_stride, accumulate);
    default:
      return multiply_tile<Vectors, kTileRows>(a, a_stride, b, depth, c, c_stride, accumulate);
  }
}

// `count` rows of the weight from `first` on: columns of the product next to each other.
struct WeightRows {
  int64_t first, count;
};

// Prefetches the cache lines of a [rows, row_bytes] block that a later loop reads, a few per call.
class Prefetcher {
 public:
  Prefetcher() = default;
  Prefetcher(const void* from, int64_t stride_bytes, int64_t rows, int64_t row_bytes, int64_t calls)
      : at_(static_cast<const char*>(from)),
        stride_(stride_bytes),
        rows_(rows),
        lines_(ceil_div(row_bytes, 64)),
        per_call_(ceil_div(rows * lines_, max_of(calls, 1))) {}

  GAFEXT_INLINE void fetch() {
    for (int64_t i = 0; i < per_call_ && row_ < rows_; ++i) {
      __builtin_prefetch(at_ + row_ * stride_ + line_ * 64, 0, 2);
      if (++line_ == lines_) line_ = 0, ++row_;
    }
  }

 private:
  const char* at_ = nullptr;
  int64_t stride_ = 0, rows_ = 0, lines_ = 0, per_call_ = 0, row_ = 0, line_ = 0;
};

}  // namespace gafext::GAFEXT_ISA
