// Matrix products f(x weight^T) of numbers that one tile product multiplies (tiles.h): bfloat16, or integers of 8 bits.
// `Problem` says what the rows of x and the columns are, and what becomes of the sums.
//
//   unit     a panel of up to kMaxPairs pairs of columns times a block of row pairs; a chunk of steps at a time:
//     columns  arranged as tiles: a word holds neighbours of what is summed over   [pairs, 2, steps], in the L2 cache
//     rows     tiles are loaded from where `Problem` has them, a chunk of a pair in L1
//     product  32 rows by 32 columns, added to the chunks before                   [block, pairs], in the L2 cache
//
// A pair is two strips of 16 rows or columns; a step is a tile: 64 bytes of what is summed over.
//
// Four tile products take 64 cycles, for which their four tiles come at 64 bytes a cycle: about what L2 delivers. So the
// vector unit takes up the sums of an earlier product in their shadow. Weights are read in their plain layout, once per
// block: arranging a tile takes 80 cycles, and a block of 32 pairs multiplies it for 1024.
//
// A Sapphire Rapids core was measured at 2.5 TFLOP/s of random bfloat16 out of the L1 cache (3.6 of zeros, which leave it
// a higher clock), convolutions of 16x16 and 32x32 at 1.3 to 1.6.
#pragma once

#include "../gemm.h"
#include "tiles.h"

#if defined(__AMX_BF16__)
namespace gafext::GAFEXT_ISA {
namespace {

// Steps, in chunks of at most `most`.
struct Chunks {
  int64_t steps, count, longest;

  Chunks(int64_t steps_, int64_t most) : steps(steps_), count(ceil_div(steps, most)), longest(ceil_div(steps, count)) {}
  int64_t begin(int64_t chunk) const { return chunk * steps / count; }
  int64_t end(int64_t chunk) const { return begin(chunk + 1); }
};

template <typename Problem>
class TileProduct {
 public:
  explicit TileProduct(Problem& problem) : problem_(problem), plan_(problem) {
    column_words_ = plan_.most_pairs() * 2 * problem.longest_chunk() * kTileWords;
    row_words_ = Problem::kGathers ? 2 * problem.longest_chunk() * kTileWords : 0;
    sum_words_ = problem.chunks() > 1 ? plan_.most_rows() * plan_.most_pairs() * kBlock * kBlock : 0;
  }

  void run() {
    const int64_t thread_words = column_words_ + row_words_ + plan_.most_pairs() * kBlock + sum_words_;
    auto* memory = reinterpret_cast<uint32_t*>(problem_.prepare(max_threads() * thread_words));
    parallel_for(plan_.panels * plan_.blocks, [&](int64_t thread, int64_t unit) {
      multiply(plan_.block(unit), plan_.panel(unit), memory + thread * thread_words);
    });
  }

 private:
  using Sum = typename Problem::Tiles::Sum;
  typedef Sum SumVec __attribute__((vector_size(4 * kLanes)));
  static constexpr int64_t kMaxPairs = Problem::kMaxPairs;  // of columns
  static constexpr int64_t kMaxRowPairs = Problem::kMaxRowPairs;
  static constexpr int64_t kFewPairs = 8;  // of rows, below which arranging the columns shows
  static constexpr int64_t kPieceRows = 2, kPieces = kBlock / kPieceRows;

  struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
  };

  // Panels of column pairs and blocks of row pairs, so many that no thread is left without a unit.
  struct Plan {
    int64_t row_pairs, column_pairs, blocks, panels;

    explicit Plan(const Problem& problem)
        : row_pairs(ceil_div(problem.rows(), kBlock)), column_pairs(problem.column_pairs()) {
      const int64_t enough = 4 * max_threads();
      blocks = ceil_div(row_pairs, kMaxRowPairs), panels = ceil_div(column_pairs, kMaxPairs);
      while (panels * blocks < enough && row_pairs / blocks >= 2 * kFewPairs) blocks *= 2;
      panels = min_of(column_pairs, max_of(panels, ceil_div(enough, blocks)));
    }
    int64_t most_pairs() const { return ceil_div(column_pairs, panels); }
    int64_t most_rows() const { return ceil_div(row_pairs, blocks); }
    Range panel(int64_t unit) const { return part(unit % panels, panels, column_pairs); }
    Range block(int64_t unit) const { return part(unit / panels, blocks, row_pairs); }
    static Range part(int64_t i, int64_t parts, int64_t whole) { return {i * whole / parts, (i + 1) * whole / parts}; }
  };

  // A product whose tiles are multiplied: its sums are taken up during the next one.
  struct Done {
    int64_t row_pair = -1, column_pair, chunk;
    Sum* sums;              // over the chunks before
    const int32_t* totals;  // of the columns
  };

  void multiply(Range block, Range panel, uint32_t* memory) const {
    auto* const totals = reinterpret_cast<int32_t*>(memory + column_words_ + row_words_);
    auto* const all_sums = reinterpret_cast<Sum*>(totals + plan_.most_pairs() * kBlock);
    const TileState tiles_are_ours;
    TermProducts<1, typename Problem::Tiles> products;
    // What is stored while product n is multiplied, that of n - 1, is taken up during n + 1: loads that follow the
    // stores would hold up everything behind them.
    alignas(64) Sum chains[2][kBlock * kBlock];
    Done stored, taken_up;
    int64_t parity = 0;
    for (int64_t chunk = 0; chunk < problem_.chunks(); ++chunk) {
      const int64_t steps = problem_.steps(chunk), pair_words = 2 * steps * kTileWords;
      for (int64_t p = 0; p < panel.size(); ++p) {
        problem_.arrange(panel.begin + p, chunk, memory + p * pair_words, totals + p * kBlock);
      }
      Sum* sums = all_sums;
      for (int64_t row_pair = block.begin; row_pair < block.end; ++row_pair) {
        const auto left = problem_.left(row_pair, chunk, memory + column_words_);
        for (int64_t p = 0; p < panel.size(); ++p, sums += kBlock * kBlock) {
          const auto work = [&](int64_t piece) {
            const int64_t row = row_pair * kBlock + piece * kPieceRows;
            if (chunk + 1 == problem_.chunks()) problem_.prefetch_out(row, kPieceRows, panel.begin + p);
            problem_.prefetch_rows(row + kBlock, kPieceRows, chunk, p, panel.size());
            if (taken_up.row_pair >= 0) take_up(taken_up, piece * kPieceRows, chains[parity]);
          };
          Spread pieces{work, 0, kPieces, steps};
          const Strips right{memory + p * pair_words, steps * kTileWords};
          products.template multiply<2>(left, right, steps, chains[parity], kBlock, pieces);
          pieces.rest();
          taken_up = stored;
          stored = {row_pair, panel.begin + p, chunk, sums, totals + p * kBlock};
          parity = 1 - parity;
        }
      }
    }
    products.finish();
    for (int64_t i = 0; i < 2; ++i, taken_up = stored, parity = 1 - parity) {
      for (int64_t piece = 0; taken_up.row_pair >= 0 && piece < kPieces; ++piece) {
        take_up(taken_up, piece * kPieceRows, chains[parity]);
      }
    }
  }

  // kPieceRows rows of a product from `first` on.
  __attribute__((noinline)) void take_up(const Done& done, int64_t first, const Sum* chain) const {
    const bool is_first = done.chunk == 0, is_last = done.chunk + 1 == problem_.chunks();
    const int64_t row = done.row_pair * kBlock + first, rows = min_of(kPieceRows, problem_.rows() - row);
    alignas(64) Sum whole[kPieceRows * kBlock];
    const Sum* before = done.sums + first * kBlock;
    Sum* sums = is_last ? whole : done.sums + first * kBlock;
    chain += first * kBlock;
    for (int64_t i = 0; i < max_of(0, rows) * kBlock; i += kLanes) {
      SumVec sum = load_bits<SumVec>(chain + i);
      if (!is_first) sum += load_bits<SumVec>(before + i);
      __builtin_memcpy(sums + i, &sum, sizeof(sum));
    }
    if (is_last && rows > 0) problem_.write(row, rows, done.column_pair, sums, done.totals);
  }

  Problem& problem_;
  const Plan plan_;
  int64_t column_words_, row_words_, sum_words_;
};

// A linear layer in bfloat16; `Layer` as in linear.h.
template <typename Layer>
class LayerInBfloat16 {
 public:
  using Tiles = Bfloat16Tiles;
  static constexpr bool kGathers = true;
  static constexpr int64_t kMaxPairs = 10, kMaxRowPairs = 32;

  explicit LayerInBfloat16(const Layer& layer)
      : layer_(layer), args_(layer.args), chunks_(ceil_div(args_.in_features, kTileDepth), kMostSteps) {}

  int64_t rows() const { return args_.rows; }
  int64_t column_pairs() const { return layer_.tiles(); }
  int64_t chunks() const { return chunks_.count; }
  int64_t longest_chunk() const { return chunks_.longest; }
  int64_t steps(int64_t chunk) const { return chunks_.end(chunk) - chunks_.begin(chunk); }
  float* prepare(int64_t floats) const { return scratch(floats); }

  // Copied: lines that are a row apart share sets of the cache (2560 features: half the time of a product).
  Strips left(int64_t row_pair, int64_t chunk, uint32_t* to) const {
    const int64_t k = chunks_.begin(chunk) * kTileDepth, words = steps(chunk) * kTileWords;
    Range unused;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t row = row_pair * kBlock + half * kTileSide;
      copy_rows(to + half * words, static_cast<const BFloat16*>(args_.x) + row * args_.x_stride + k, args_.x_stride,
                args_.rows - row, min_of(steps(chunk) * kTileDepth, args_.in_features - k), unused);
    }
    return {to, words};
  }

  void arrange(int64_t pair, int64_t chunk, uint32_t* to, int32_t*) const {
    const int64_t k = chunks_.begin(chunk) * kTileDepth;
    const int64_t depth = min_of(steps(chunk) * kTileDepth, args_.in_features - k);
    for (int64_t half = 0; half < 2; ++half, to += steps(chunk) * kTileWords) {
      const WeightRows rows = layer_.weight_rows(pair, half);
      Range unused;
      copy_columns(to, static_cast<const BFloat16*>(args_.weight) + rows.first * args_.weight_stride + k,
                   args_.weight_stride, rows.count, depth, unused);
    }
  }

  void prefetch_out(int64_t row, int64_t rows, int64_t pair) const {
    for (int64_t r = row; r < min_of(row + rows, args_.rows); ++r) prefetch_to_write(layer_.out(r, pair));
  }

  // The part-th of `parts` parts of what left() will read.
  void prefetch_rows(int64_t row, int64_t rows, int64_t chunk, int64_t part, int64_t parts) const {
    const int64_t begin = chunks_.begin(chunk) + part * steps(chunk) / parts;
    const int64_t end = chunks_.begin(chunk) + (part + 1) * steps(chunk) / parts;
    for (int64_t r = row; r < min_of(row + rows, args_.rows); ++r) {
      const auto* from = static_cast<const BFloat16*>(args_.x) + r * args_.x_stride;
      for (int64_t step = begin; step < end; ++step) __builtin_prefetch(from + step * kTileDepth, 0, 2);
    }
  }

  void write(int64_t row, int64_t rows, int64_t pair, const float* sums, const int32_t*) const {
    layer_.write(row, rows, pair, sums);
  }

 private:
  static constexpr int64_t kMostSteps = 20;

  const Layer& layer_;
  const decltype(Layer::args) args_;
  const Chunks chunks_;
};

template <typename Layer>
void run_in_bfloat16(const Layer& layer) {
  LayerInBfloat16<Layer> problem(layer);
  TileProduct(problem).run();
}

}  // namespace
}  // namespace gafext::GAFEXT_ISA
#endif
