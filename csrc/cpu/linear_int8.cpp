// A linear layer with 8-bit weights, whose inputs are rounded to 8 bits row by row.
//
// First every row of x is rounded, once, to the words that integers.h multiplies: pairs of 16-bit numbers, or quads of
// 8-bit ones, which are unsigned and 128 too large where the instruction wants them so. Then a unit of work is kColumns output columns times a block of rows. It
// takes slices of kDepth features:
//
//   weights  transposed, and widened for pairs    [panel, words, kPanel], 32 KB, in the L2 cache
//   product  sums += q_x q_w^T in register tiles  [rows, kColumns], 32-bit integers, in the L2 cache
//
// and after the last slice out = sums s_x s_w + bias. Integers add exactly, so every instruction set and any number of
// threads give the same sums. Weights are read in their plain layout: nothing is packed at load. With AMX,
// amx/linear_int8.h takes all but few rows.
#include "../ops/linear_int8.h"

#include "amx/linear_int8.h"
#include "gemm.h"
#include "integers.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kColumns = 64;   // of a unit
constexpr int64_t kDepth = 256;    // features of a slice
constexpr int64_t kMaxRows = 252;  // of a unit: 129 KB of pairs, 64 KB of sums
constexpr int64_t kMinRows = 48;   // of a unit, below which transposing the weights shows

typedef int8_t PairBytes __attribute__((vector_size(2 * kLanes)));

// How a problem is cut, and one thread's memory.
struct Plan {
  int64_t words;         // of a row of x
  int64_t rows, blocks;  // of a unit, and the number of such blocks
  int64_t units;         // of columns
  int64_t thread_words;

  Plan(const LinearInt8Args& args, int64_t numbers_per_word) {
    words = ceil_div(args.in_features, numbers_per_word);
    units = ceil_div(args.out_features, kColumns);
    blocks = ceil_div(args.rows, kMaxRows);
    while (args.rows / blocks >= 2 * kMinRows && units * blocks < 4 * max_threads()) blocks *= 2;
    rows = round_up(ceil_div(args.rows, blocks), kTileRows);
    blocks = ceil_div(args.rows, rows);
    thread_words = kColumns * (kDepth / numbers_per_word + rows + 1);
  }
};

template <Products kind, typename T>
class Product {
  static constexpr int64_t kNumbers = per_word(kind);
  static constexpr int64_t kWords = kDepth / kNumbers;  // of a slice
  static constexpr int32_t kShift = is_shifted(kind) ? 128 : 0;
  using Number = typename Left<is_quads(kind), is_shifted(kind)>::Number;  // of x
  using Numbers = typename Left<is_quads(kind), is_shifted(kind)>::Vector;

 public:
  explicit Product(const LinearInt8Args& args) : args_(args), plan_(args, kNumbers) {
    scales_ = scratch(args.rows * (plan_.words + 1) + max_threads() * plan_.thread_words);
    x_ = reinterpret_cast<uint32_t*>(scales_ + args.rows);
    threads_ = x_ + args.rows * plan_.words;
  }

  void run() {
    parallel_for(ceil_div(args_.rows, kTileRows), [&](int64_t, int64_t unit) {
      for (int64_t r = unit * kTileRows; r < min_of(args_.rows, (unit + 1) * kTileRows); ++r) round_row(r);
    });
    parallel_for(plan_.units * plan_.blocks, [&](int64_t thread, int64_t unit) {
      const int64_t row = unit / plan_.units * plan_.rows;
      multiply(unit % plan_.units * kColumns, row, min_of(plan_.rows, args_.rows - row),
               threads_ + thread * plan_.thread_words);
    });
  }

 private:
  void round_row(int64_t row) const {
    const T* x = static_cast<const T*>(args_.x) + row * args_.x_stride;
    const int64_t count = args_.in_features;
    const RowScale of_row(x, count);
    scales_[row] = of_row.scale;
    const auto rounded = [&](Vec v) {
      return __builtin_convertvector(round_to_int(v * of_row.factor) + kShift, Numbers);
    };
    auto* to = reinterpret_cast<Number*>(x_ + row * plan_.words);
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) {
      const Numbers q = rounded(load(x + c));
      __builtin_memcpy(to + c, &q, sizeof(q));
    }
    if (c < count) {
      const Numbers q = rounded(load_first(x + c, count - c));
      __builtin_memcpy(to + c, &q, round_up(count - c, kNumbers) * sizeof(Number));
    }
  }

  // Output columns [column, column + kColumns), and `rows` rows from `row` on.
  void multiply(int64_t column, int64_t row, int64_t rows, uint32_t* memory) const {
    auto* column_sums = reinterpret_cast<int32_t*>(memory);
    int32_t* sums = column_sums + kColumns;
    uint32_t* weight = memory + kColumns * (plan_.rows + 1);
    const int64_t count = min_of(kColumns, args_.out_features - column), panels = ceil_div(count, kPanel);
    const int64_t from_start = args_.in_features == 0 ? (rows + 1) * kColumns : kColumns;
    for (int64_t i = 0; i < from_start; ++i) column_sums[i] = 0;
    for (int64_t k = 0; k < args_.in_features; k += kDepth) {
      const int64_t depth = min_of(kDepth, args_.in_features - k), words = ceil_div(depth, kNumbers);
      pack(column, count, k, depth, weight, column_sums);
      Prefetcher next(args_.weight + column * args_.weight_stride + k + depth, args_.weight_stride, count,
                      min_of(kDepth, args_.in_features - k - depth), panels * ceil_div(rows, kTileRows));
      for (int64_t panel = 0; panel < panels; ++panel) {
        for (int64_t r = 0; r < rows; r += kTileRows) {
          next.fetch();
          multiply_rows<kind>(min_of(kTileRows, rows - r), x_ + (row + r) * plan_.words + k / kNumbers, plan_.words,
                              weight + panel * kWords * kPanel, words, sums + r * kColumns + panel * kPanel, kColumns,
                              k > 0);
        }
      }
    }
    auto* scale = reinterpret_cast<float*>(weight);  // and the bias; the weights are done with
    copy_row(scale, args_.scale + column, count);
    if (args_.bias != nullptr) {
      copy_row(scale + kColumns, static_cast<const T*>(args_.bias) + column, count);
    } else {
      for (int64_t c = 0; c < kColumns; ++c) scale[kColumns + c] = 0.0f;
    }
    for (int64_t r = 0; r < rows; ++r) write(row + r, column, count, sums + r * kColumns, column_sums, scale);
  }

  // Features [k, k + depth) of the columns, and what they add up to; what is missing is zero.
  void pack(int64_t column, int64_t count, int64_t k, int64_t depth, uint32_t* to, int32_t* column_sums) const {
    for (int64_t c = 0; c < count; c += kLanes) {
      const int8_t* from = args_.weight + (column + c) * args_.weight_stride + k;
      uint32_t* panel = to + c / kPanel * kWords * kPanel + c % kPanel;
      IntVec total = load_bits<IntVec>(column_sums + c);
      for (int64_t w = 0; w < depth; w += kLanes * kNumbers) {
        Vec block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          block[i] = c + i < count ? load_numbers(from + i * args_.weight_stride + w, depth - w) : Vec{};
        }
        transpose(block);
        const int64_t words = min_of(kLanes, ceil_div(depth - w, kNumbers));
        for (int64_t i = 0; i < words; ++i) {
          store(reinterpret_cast<float*>(panel + (w / kNumbers + i) * kPanel), block[i]);
          if constexpr (kShift != 0) add_products<kind>(total, 0x01010101 - IntVec{}, bit_cast<IntVec>(block[i]));
        }
      }
      __builtin_memcpy(column_sums + c, &total, sizeof(total));
    }
  }

  // kLanes words of numbers; what is missing is zero.
  static GAFEXT_INLINE Vec load_numbers(const int8_t* from, int64_t count) {
    if constexpr (is_quads(kind)) {
      return bit_cast<Vec>(load_bytes_up_to<QuadVec>(from, count));
    } else {
      return bit_cast<Vec>(__builtin_convertvector(load_bytes_up_to<PairBytes>(from, count), PairVec));
    }
  }

  void write(int64_t row, int64_t column, int64_t count, const int32_t* sums, const int32_t* column_sums,
             const float* scale) const {
    const float *bias = scale + kColumns, of_row = scales_[row];
    T* out = static_cast<T*>(args_.out) + row * args_.out_features + column;
    for (int64_t c = 0; c < count; c += kLanes, sums += kLanes) {
      IntVec sum = load_bits<IntVec>(sums);
      if constexpr (kShift != 0) sum -= kShift * load_bits<IntVec>(column_sums + c);
      const Vec result = __builtin_convertvector(sum, Vec) * (of_row * load(scale + c)) + load(bias + c);
      count - c >= kLanes ? store(out + c, result) : store_first(out + c, result, count - c);
    }
  }

  const LinearInt8Args& args_;
  const Plan plan_;
  float* scales_;      // [rows]: s_x
  uint32_t* x_;        // [rows, words]
  uint32_t* threads_;  // [thread_words] each
};

template <typename T>
void multiply(const LinearInt8Args& args) {
#if defined(__AMX_INT8__)
  if (args.rows >= kFewestTileRows && args.in_features > 0 && has_amx_int8()) return LinearInt8OnTiles<T>(args).run();
#endif
#if defined(__AVX512F__)
  if (has_vnni()) return Product<Products::kQuadsVnni, T>(args).run();
#endif
#if defined(__aarch64__)
  if (has_dot_products()) return Product<Products::kSignedQuads, T>(args).run();
#endif
#if defined(__AVX2__) || defined(__aarch64__)
  Product<Products::kPairs, T>(args).run();
#else
  Product<Products::kQuads, T>(args).run();  // as slow as the plain code that it is; it tests what VNNI runs
#endif
}

}  // namespace

void linear_int8(const LinearInt8Args& args) {
  if (args.rows * args.out_features == 0) return;
  with_element_type(args.dtype, [&](auto element) { multiply<decltype(element)>(args); });
}

}  // namespace gafext::GAFEXT_ISA
