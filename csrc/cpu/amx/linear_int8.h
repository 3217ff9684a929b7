// linear_int8 on AMX tiles (tiles.h), which multiply signed 8-bit integers and add in 32 bits.
//
//   x        rounded row by row, once                        [strips, steps, 16, 16 words], a byte a number
//   unit     up to kMaxPairs pairs of columns times a block of row pairs:
//     weight   word i of a line holds four features of column i    [strips, steps, 16, 16 words], in the L2 cache
//     product  32 rows by 32 columns; scaled and written while the next one is multiplied
//
// A strip is 16 rows or columns, a pair two strips, a step 64 features. What is missing of x is whatever was there
// before: features meet zeros in the weights, and rows are not written.
//
// A tile product takes 16 cycles for 16 * 16 * 64 multiply-adds, 1024 a cycle, where AVX512_VNNI has 128. Arranging a
// tile of weights takes about 80, as long as multiplying it by 5 strips.
#pragma once

#include "../../ops/linear_int8.h"
#include "../gemm.h"
#include "../integers.h"
#include "tiles.h"

#if defined(__AMX_INT8__)
namespace gafext::GAFEXT_ISA {
namespace {

template <typename T>
class LinearInt8OnTiles {
 public:
  explicit LinearInt8OnTiles(const LinearInt8Args& args)
      : args_(args), plan_(args), steps_(ceil_div(args.in_features, kFeatures)), strip_words_(steps_ * kTileWords) {}

  void run() {
    const int64_t weight_words = plan_.most_pairs() * 2 * strip_words_;
    scales_ = scratch(plan_.row_pairs * (kBlock + 2 * strip_words_) + max_threads() * weight_words);
    x_ = reinterpret_cast<uint32_t*>(scales_ + plan_.row_pairs * kBlock);
    uint32_t* threads = x_ + plan_.row_pairs * 2 * strip_words_;
    parallel_for(ceil_div(args_.rows, kTileSide), [&](int64_t, int64_t strip) { round_strip(strip); });
    parallel_for(plan_.panels * plan_.blocks, [&](int64_t thread, int64_t unit) {
      multiply(plan_.block(unit), plan_.panel(unit), threads + thread * weight_words);
    });
  }

 private:
  static constexpr int64_t kFeatures = 64;                  // of a step
  static constexpr int64_t kMaxPairs = 6;                   // of columns, as in linear.h
  static constexpr int64_t kManyPairs = 32, kFewPairs = 8;  // of rows: arranging weights takes 8 or 31 % of the time
  static constexpr int64_t kAheadRows = 8;                  // of x, that are prefetched while a row is rounded
  static constexpr int64_t kPieceRows = 2, kPieces = kBlock / kPieceRows;

  struct Range {
    int64_t begin, end;
  };

  // Panels of column pairs and blocks of row pairs, so many that no thread is left without a unit.
  struct Plan {
    int64_t row_pairs, column_pairs, blocks, panels;

    explicit Plan(const LinearInt8Args& args)
        : row_pairs(ceil_div(args.rows, kBlock)), column_pairs(ceil_div(args.out_features, kBlock)) {
      if (args.gated) column_pairs = ceil_div(args.out_features / 2, kTileSide);
      const int64_t enough = 4 * max_threads();
      blocks = ceil_div(row_pairs, kManyPairs), panels = ceil_div(column_pairs, kMaxPairs);
      while (panels * blocks < enough && row_pairs / blocks >= 2 * kFewPairs) blocks *= 2;
      panels = min_of(column_pairs, max_of(panels, ceil_div(enough, blocks)));
    }
    int64_t most_pairs() const { return ceil_div(column_pairs, panels); }
    Range panel(int64_t unit) const { return part(unit % panels, panels, column_pairs); }
    Range block(int64_t unit) const { return part(unit / panels, blocks, row_pairs); }
    static Range part(int64_t i, int64_t parts, int64_t whole) { return {i * whole / parts, (i + 1) * whole / parts}; }
  };

  void round_strip(int64_t strip) const {
    typedef int8_t Numbers __attribute__((vector_size(kLanes)));
    for (int64_t line = 0, row = strip * kTileSide; line < kTileSide && row < args_.rows; ++line, ++row) {
      const T *x = static_cast<const T*>(args_.x) + row * args_.x_stride, *next = x + kAheadRows * args_.x_stride;
      for (int64_t c = 0; c < args_.in_features; c += 64 / sizeof(T)) __builtin_prefetch(next + c, 0, 2);
      const RowScale of_row(x, args_.in_features);
      scales_[row] = of_row.scale;
      uint32_t* to = x_ + strip * strip_words_ + line * kTileSide;
      for (int64_t c = 0; c < args_.in_features; c += kLanes) {
        const Vec scaled = load_up_to(x + c, args_.in_features - c) * of_row.factor;
        const Numbers numbers = __builtin_convertvector(round_to_int(scaled), Numbers);
        __builtin_memcpy(to + c / kFeatures * kTileWords + c % kFeatures / 4, &numbers, sizeof(numbers));
      }
    }
  }

  // The columns of a strip. Of gated ones a pair is 16 columns of values and their 16 columns of gates.
  WeightRows columns_of(int64_t strip) const {
    const int64_t inner = args_.out_features / 2, column = strip / 2 * kTileSide;
    if (args_.gated) return {strip % 2 * inner + column, inner - column};
    return {strip * kTileSide, args_.out_features - strip * kTileSide};
  }

  // What is missing is zero.
  void arrange_strip(int64_t strip, uint32_t* to) const {
    const auto [column, columns] = columns_of(strip);
    for (int64_t k = 0; k < args_.in_features; k += kFeatures, to += kTileWords) {
      Vec lines[kTileSide];
      for (int64_t c = 0; c < kTileSide; ++c) {
        const int64_t count = c < columns ? args_.in_features - k : 0;
        lines[c] =
            bit_cast<Vec>(load_bytes_up_to<QuadVec>(args_.weight + (column + c) * args_.weight_stride + k, count));
      }
      transpose(lines);
      for (int64_t i = 0; i < kTileSide; ++i) store(reinterpret_cast<float*>(to) + i * kTileSide, lines[i]);
    }
  }

  void multiply(Range block, Range panel, uint32_t* weight) const {
    for (int64_t strip = 2 * panel.begin; strip < 2 * panel.end; ++strip) {
      arrange_strip(strip, weight + (strip - 2 * panel.begin) * strip_words_);
    }
    const TileState tiles_are_ours;
    TermProducts<1, Int8Tiles> products;
    alignas(64) int32_t sums[kBlock * kBlock];  // of the product before, stored since the next one began
    int64_t row_pair = -1, column_pair = -1;    // where that belongs
    const auto write_piece = [&](int64_t piece) {
      args_.gated ? write_gated(row_pair, column_pair, piece, sums) : write(row_pair, column_pair, piece, sums);
    };
    for (int64_t q = block.begin; q < block.end; ++q) {
      const Strips rows{x_ + q * 2 * strip_words_, strip_words_};
      for (int64_t p = panel.begin; p < panel.end; ++p) {
        const Strips columns{weight + (p - panel.begin) * 2 * strip_words_, strip_words_};
        const auto work = [&](int64_t piece) {
          prefetch_out(q, p, piece);
          if (row_pair >= 0) write_piece(piece);
        };
        Spread pieces{work, 0, kPieces, steps_ * products.kTurns};
        products.multiply<2>(rows, columns, steps_, sums, kBlock, pieces);
        pieces.rest();
        row_pair = q, column_pair = p;
      }
    }
    products.finish();
    for (int64_t piece = 0; piece < kPieces; ++piece) write_piece(piece);
  }

  // kPieceRows rows of a product.
  __attribute__((noinline)) void write(int64_t row_pair, int64_t column_pair, int64_t piece,
                                       const int32_t* sums) const {
    const int64_t row = row_pair * kBlock + piece * kPieceRows, rows = min_of(kPieceRows, args_.rows - row);
    sums += piece * kPieceRows * kBlock;
    for (int64_t column = column_pair * kBlock, end = min_of(column + kBlock, args_.out_features); column < end;
         column += kTileSide, sums += kTileSide) {
      const int64_t columns = end - column;
      const Vec scale = load_up_to(args_.scale + column, columns);
      const T* biases = static_cast<const T*>(args_.bias);
      const Vec bias = biases == nullptr ? Vec{} : load_up_to(biases + column, columns);
      T* out = static_cast<T*>(args_.out) + row * args_.out_features + column;
      const T* residual = static_cast<const T*>(args_.residual);
      if (residual != nullptr) residual += row * args_.residual_stride + column;
      for (int64_t r = 0; r < rows; ++r, out += args_.out_features) {
        const Vec sum = __builtin_convertvector(load_bits<IntVec>(sums + r * kBlock), Vec);
        Vec result = sum * (scales_[row + r] * scale) + bias;
        if (residual != nullptr) result += load_up_to(residual + r * args_.residual_stride, columns);
        columns >= kTileSide ? store_rounded(out, result) : store_first(out, result, columns);
      }
    }
  }

  // What write_gated() or write() will write of this product, after the next one: stores that miss the cache hold up
  // what follows them (GEGLU of 8192 rows in bfloat16: twice the time).
  GAFEXT_INLINE void prefetch_out(int64_t row_pair, int64_t column_pair, int64_t piece) const {
    const int64_t row = row_pair * kBlock + piece * kPieceRows, end = min_of(row + kPieceRows, args_.rows);
    const int64_t width = args_.gated ? args_.out_features / 2 : args_.out_features;
    const int64_t column = column_pair * (args_.gated ? kTileSide : kBlock);
    const T* out = static_cast<const T*>(args_.out) + column;
    for (int64_t r = row; r < end; ++r) prefetch_to_write(out + r * width);
    if (args_.residual == nullptr) return;
    const T* residual = static_cast<const T*>(args_.residual) + column;
    for (int64_t r = row; r < end; ++r) __builtin_prefetch(residual + r * args_.residual_stride);
  }

  // write(), of values and their gates.
  __attribute__((noinline)) void write_gated(int64_t row_pair, int64_t column_pair, int64_t piece,
                                             const int32_t* sums) const {
    const int64_t row = row_pair * kBlock + piece * kPieceRows, rows = min_of(kPieceRows, args_.rows - row);
    const auto [column, columns] = columns_of(2 * column_pair);
    const int64_t inner = args_.out_features / 2;
    const T* biases = static_cast<const T*>(args_.bias);
    Vec scale[2], bias[2] = {};
    GAFEXT_UNROLL
    for (int half = 0; half < 2; ++half) {
      scale[half] = load_up_to(args_.scale + half * inner + column, columns);
      if (biases != nullptr) bias[half] = load_up_to(biases + half * inner + column, columns);
    }
    sums += piece * kPieceRows * kBlock;
    T* out = static_cast<T*>(args_.out) + row * inner + column;
    for (int64_t r = 0; r < rows; ++r, out += inner, sums += kBlock) {
      Vec v[2];
      GAFEXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Vec sum = __builtin_convertvector(load_bits<IntVec>(sums + half * kTileSide), Vec);
        v[half] = sum * (scales_[row + r] * scale[half]) + bias[half];
      }
      const Vec gated = v[0] * gelu_of(v[1]);
      columns >= kTileSide ? store_rounded(out, gated) : store_first(out, gated, columns);
    }
  }

  const LinearInt8Args& args_;
  const Plan plan_;
  const int64_t steps_, strip_words_;
  float* scales_ = nullptr;  // [rows]: s_x
  uint32_t* x_ = nullptr;    // [row pairs, 2, strip_words]
};

}  // namespace
}  // namespace gafext::GAFEXT_ISA
#endif
