// A linear layer with 8-bit weights, whose inputs are rounded to 8 bits row by row; or GEGLU's, with the gate.
//
// First every row of x is rounded, once, to the words that integers.h multiplies: pairs of 16-bit numbers, or quads of
// 8-bit ones, which are unsigned and 128 too large where the instruction wants them so. Then a unit of work is
// kColumns columns of weights times a block of rows. It takes slices of kDepth words, of which most layers have one:
//
//   weights  transposed, and widened for pairs    [panel, words, kPanel], 80 KB, in the L2 cache
//   product  sums = q_x q_w^T in register tiles; after the last slice out = sums s_x s_w + bias + residual.
//            Sums of slices before it wait in the L2 cache, [rows, kColumns] 32-bit integers
//
// Of gated layers a panel is half a panel of value columns beside their gate columns, and out = value gelu(gate).
// Integers add exactly, so any number of threads gives the same sums, and every instruction set but for x that is rounded
// next to a tie. Weights are read in
// their plain layout: nothing is packed at load. With AMX, amx/linear_int8.h takes all but few rows.
#include "../ops/linear_int8.h"

#include "amx/linear_int8.h"
#include "gemm.h"
#include "integers.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kColumns = 64;   // of a unit
constexpr int64_t kDepth = 320;    // words of a slice: those of 1280 features where a word is a quad
constexpr int64_t kMaxRows = 504;  // of a unit
constexpr int64_t kMinRows = 48;   // of a unit, below which transposing the weights shows

constexpr int64_t kRoundedRows = 48;   // that a thread rounds at a time
constexpr int64_t kAheadBytes = 8192;  // of x, that are prefetched there: 15 to 20 % of rounding

typedef int8_t PairBytes __attribute__((vector_size(2 * kLanes)));

// How a problem is cut, and one thread's memory.
struct Plan {
  int64_t words;         // of a row of x
  int64_t rows, blocks;  // of a unit, and the number of such blocks
  int64_t units;         // of columns
  int64_t thread_words;

  Plan(const LinearInt8Args& args, int64_t numbers_per_word) {
    words = ceil_div(args.in_features, numbers_per_word);
    units = args.gated ? ceil_div(args.out_features / 2, kColumns / 2) : ceil_div(args.out_features, kColumns);
    blocks = ceil_div(args.rows, kMaxRows);
    while (args.rows / blocks >= 2 * kMinRows && units * blocks < 4 * max_threads()) blocks *= 2;
    rows = round_up(ceil_div(args.rows, blocks), kTileRows);
    blocks = ceil_div(args.rows, rows);
    const int64_t sums = words > kDepth ? rows : 0;
    thread_words = kColumns * (3 + min_of(words, kDepth) + sums);
  }
};

template <Products kind, typename T>
class Product {
  static constexpr int64_t kNumbers = per_word(kind);
  static constexpr int32_t kShift = is_shifted(kind) ? 128 : 0;
  static constexpr int64_t kHalf = kPanel / 2;                             // of a panel of a gated layer: value columns
  using Number = typename Left<is_quads(kind), is_shifted(kind)>::Number;  // of x
  using Numbers = typename Left<is_quads(kind), is_shifted(kind)>::Vector;

 public:
  explicit Product(const LinearInt8Args& args)
      : args_(args),
        plan_(args, kNumbers),
        width_(args.gated ? args.out_features / 2 : args.out_features),
        panel_columns_(args.gated ? kHalf : kPanel),
        ahead_(ceil_div(kAheadBytes, args.in_features * sizeof(T) + 1)) {
    const int64_t threads_words = max_threads() * plan_.thread_words;  // first, as whole cache lines
    threads_ = reinterpret_cast<uint32_t*>(scratch(threads_words + args.rows * (plan_.words + 1)));
    x_ = threads_ + threads_words;
    scales_ = reinterpret_cast<float*>(x_ + args.rows * plan_.words);
  }

  void run() {
    parallel_for(ceil_div(args_.rows, kRoundedRows), [&](int64_t, int64_t unit) {
      const int64_t row = unit * kRoundedRows, end = min_of(args_.rows, row + kRoundedRows);
      for (int64_t r = row; r < end; ++r) round_row(r);
    });
    const int64_t units = plan_.units * plan_.blocks, threads = max_threads();
    parallel_for(units, [&](int64_t thread, int64_t index) {
      const Scratch memory(plan_, threads_ + thread * plan_.thread_words);
      multiply(unit(index), unit(min_of(index + threads, units - 1)), memory);
    });
  }

 private:
  // Output columns from `column` on, and rows [row, row + rows).
  struct Unit {
    int64_t column, row, rows;
  };

  Unit unit(int64_t index) const {
    const int64_t row = index / plan_.units * plan_.rows;
    return {index % plan_.units * (kColumns / kPanel * panel_columns_), row, min_of(plan_.rows, args_.rows - row)};
  }

  // One thread's memory. Every part begins at a whole vector.
  struct Scratch {
    float *scale, *bias;   // [kColumns]: s_w, and the bias
    int32_t* column_sums;  // [kColumns], times kShift
    uint32_t* weight;      // [panels, words of a slice, kPanel]
    int32_t* sums;         // [panels, rows, kPanel] of the slices before; unused where there is one

    Scratch(const Plan& plan, uint32_t* memory) {
      scale = reinterpret_cast<float*>(memory);
      bias = scale + kColumns;
      column_sums = reinterpret_cast<int32_t*>(memory) + 2 * kColumns;
      weight = memory + 3 * kColumns;
      sums = reinterpret_cast<int32_t*>(weight) + kColumns * min_of(plan.words, kDepth);
    }
  };

  void round_row(int64_t row) const {
    const T* x = static_cast<const T*>(args_.x) + row * args_.x_stride;
    const int64_t count = args_.in_features;
    for (int64_t c = 0; c < count; c += 64 / sizeof(T)) __builtin_prefetch(x + ahead_ * args_.x_stride + c, 0, 2);
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

  // What lanes [c, c + kLanes) of a unit's panels hold, c < kColumns.
  WeightRows columns_of(const Unit& unit, int64_t c) const {
    if (!args_.gated) return {unit.column + c, max_of(0, min_of(kLanes, args_.out_features - unit.column - c))};
    const int64_t inner = args_.out_features / 2, column = unit.column + c / kPanel * kHalf + c % kHalf;
    return {(c % kPanel < kHalf ? 0 : inner) + column, max_of(0, min_of(kLanes, inner - column))};
  }

  // `after` is the unit that the thread is likely to take next.
  void multiply(const Unit& unit, const Unit& after, const Scratch& memory) const {
    const int64_t panels = min_of(kColumns / kPanel, ceil_div(width_ - unit.column, panel_columns_));
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      const auto [first, count] = columns_of(unit, c);
      store(memory.scale + c, load_up_to(args_.scale + first, count));
      const T* bias = static_cast<const T*>(args_.bias);
      store(memory.bias + c, bias == nullptr ? Vec{} : load_up_to(bias + first, count));
      store(reinterpret_cast<float*>(memory.column_sums + c), Vec{});
    }
    int64_t word = 0;
    do {
      const int64_t words = min_of(kDepth, plan_.words - word), end = word + words;
      pack(unit, panels, word, words, memory);
      const int64_t calls = panels * ceil_div(unit.rows, kTileRows);
      Prefetcher values = end < plan_.words ? fetching(unit, 0, end, calls) : fetching(after, 0, 0, calls);
      Prefetcher gates = end < plan_.words ? fetching(unit, kHalf, end, calls) : fetching(after, kHalf, 0, calls);
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t r = 0; r < unit.rows; r += kTileRows) {
          values.fetch();
          if (args_.gated) gates.fetch();
          const Tile tile{.row = unit.row + r,
                          .column = unit.column + p * panel_columns_,
                          .lane = p * kPanel,
                          .word = word,
                          .words = words,
                          .weight = memory.weight + p * words * kPanel,
                          .sums = memory.sums + (p * plan_.rows + r) * kPanel};
          multiply_rows(min_of(kTileRows, unit.rows - r), tile, memory);
        }
      }
      word = end;
    } while (word < plan_.words);
  }

  // Prefetches what pack() reads of the slice from `word` on: rows of the weight from that of lane c on.
  Prefetcher fetching(const Unit& unit, int64_t c, int64_t word, int64_t calls) const {
    const int64_t rows = min_of(kColumns / kPanel * panel_columns_, width_ - unit.column);
    return {args_.weight + columns_of(unit, c).first * args_.weight_stride + word * kNumbers, args_.weight_stride, rows,
            min_of(kDepth * kNumbers, args_.in_features - word * kNumbers), calls};
  }

  // A register tile: rows from `row` on by a panel, of which output column `column` is the first.
  struct Tile {
    int64_t row, column;
    int64_t lane;         // of the unit's kColumns, the panel's first
    int64_t word, words;  // of the slice
    const uint32_t* weight;
    int32_t* sums;
  };

  void multiply_rows(int64_t rows, const Tile& tile, const Scratch& memory) const {
    switch (rows) {
      case 1:
        return multiply_tile<1>(tile, memory);
      case 2:
        return multiply_tile<2>(tile, memory);
      case 3:
        return multiply_tile<3>(tile, memory);
      case 4:
        return multiply_tile<4>(tile, memory);
      case 5:
        return multiply_tile<5>(tile, memory);
      default:
        return multiply_tile<kTileRows>(tile, memory);
    }
  }

  template <int Rows>
  void multiply_tile(const Tile& tile, const Scratch& memory) const {
    const bool is_last = tile.word + tile.words == plan_.words;
    const int64_t columns = min_of(panel_columns_, width_ - tile.column);
    T* out = static_cast<T*>(args_.out) + tile.row * width_ + tile.column;
    if (is_last) {  // stores that miss the cache hold up what follows them
      for (int r = 0; r < Rows; ++r) {
        for (int64_t c = 0; c < columns; c += 64 / sizeof(T)) prefetch_to_write(out + r * width_ + c);
      }
    }
    alignas(64) int32_t sums[Rows][kPanel];
    sum_words<Rows>(x_ + tile.row * plan_.words + tile.word, plan_.words, tile.weight, tile.words, sums[0]);
    for (int r = 0; r < Rows; ++r) {
      int32_t* before = tile.sums + r * kPanel;
      if (tile.word > 0) {
        for (int64_t c = 0; c < kPanel; ++c) sums[r][c] += before[c];
      }
      if (!is_last) {
        __builtin_memcpy(before, sums[r], sizeof(sums[r]));
      } else if (args_.gated) {
        write_gated(scales_[tile.row + r], columns, sums[r], tile.lane, memory, out + r * width_);
      } else {
        const T* residual = static_cast<const T*>(args_.residual);
        if (residual != nullptr) residual += (tile.row + r) * args_.residual_stride + tile.column;
        write(scales_[tile.row + r], columns, sums[r], tile.lane, memory, residual, out + r * width_);
      }
    }
  }

  // Apart from the rest, so that the compiler has registers for all pointers of the loop.
  template <int Rows>
  static __attribute__((noinline)) void sum_words(const uint32_t* x, int64_t x_stride, const uint32_t* weight,
                                                  int64_t words, int32_t* sums) {
    IntVec tile[Rows][kTileVectors] = {};
    add_words<kind>(x, x_stride, weight, words, tile);
    GAFEXT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      GAFEXT_UNROLL
      for (int v = 0; v < kTileVectors; ++v)
        __builtin_memcpy(sums + r * kPanel + v * kLanes, &tile[r][v], sizeof(IntVec));
    }
  }

  // Words [word, word + words) of the unit's columns, and what they add up to; what is missing is zero.
  void pack(const Unit& unit, int64_t panels, int64_t word, int64_t words, const Scratch& memory) const {
    const int64_t depth = min_of(words * kNumbers, args_.in_features - word * kNumbers);
    for (int64_t c = 0; c < panels * kPanel; c += kLanes) {
      const auto [first, count] = columns_of(unit, c);
      const int8_t* from = args_.weight + first * args_.weight_stride + word * kNumbers;
      uint32_t* panel = memory.weight + c / kPanel * words * kPanel + c % kPanel;
      IntVec total{};
      for (int64_t w = 0; w < words; w += kLanes) {
        Vec block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          block[i] =
              i < count ? load_numbers(from + i * args_.weight_stride + w * kNumbers, depth - w * kNumbers) : Vec{};
        }
        transpose(block);
        for (int64_t i = 0; i < min_of(kLanes, words - w); ++i) {
          store(reinterpret_cast<float*>(panel + (w + i) * kPanel), block[i]);
          if constexpr (kShift != 0) add_products<kind>(total, 0x01010101 - IntVec{}, bit_cast<IntVec>(block[i]));
        }
      }
      total = load_bits<IntVec>(memory.column_sums + c) + kShift * total;
      __builtin_memcpy(memory.column_sums + c, &total, sizeof(total));
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

  static GAFEXT_INLINE Vec scaled(const int32_t* sums, float of_row, int64_t lane, const Scratch& memory) {
    IntVec sum = load_bits<IntVec>(sums);
    if constexpr (kShift != 0) sum -= load_bits<IntVec>(memory.column_sums + lane);
    return __builtin_convertvector(sum, Vec) * (of_row * load(memory.scale + lane)) + load(memory.bias + lane);
  }

  static GAFEXT_INLINE void write(float of_row, int64_t columns, const int32_t* sums, int64_t lane,
                                  const Scratch& memory, const T* residual, T* out) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec result = scaled(sums + c, of_row, lane + c, memory);
      if (residual != nullptr) result += load_up_to(residual + c, columns - c);
      store_up_to(out + c, result, columns - c);
    }
  }

  static GAFEXT_INLINE void write_gated(float of_row, int64_t columns, const int32_t* sums, int64_t lane,
                                        const Scratch& memory, T* out) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Vec value = scaled(sums + c, of_row, lane + c, memory);
      const Vec gate = scaled(sums + kHalf + c, of_row, lane + kHalf + c, memory);
      store_up_to(out + c, value * gelu_of(gate), columns - c);
    }
  }

  const LinearInt8Args& args_;
  const Plan plan_;
  const int64_t width_;          // of out
  const int64_t panel_columns_;  // of out, in a panel
  const int64_t ahead_;          // rows that are prefetched ahead
  uint32_t* threads_;            // [thread_words] each
  uint32_t* x_;                  // [rows, words]
  float* scales_;                // [rows]: s_x
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
