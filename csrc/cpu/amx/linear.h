// Linear layers on AMX tiles (tiles.h): f(x weight^T), where `Layer` says which rows of the weight make up the 32
// columns of a tile of the product, and what becomes of its sums.
//
//   shared   the operand with fewer rows, x or the weight: split once          [pairs, steps], 6 bytes a number, in L3
//   unit     up to kMaxPairs pairs of the other operand times a block of the shared one; a chunk of steps at a time:
//     own      split                                                           [pairs, chunk], 738 KB, in the L2 cache
//     product  32 rows by 32 columns, added to the chunks before               [block, pairs], in the L2 cache
//
// The vector unit takes up a product's sums, and applies f to the last of them, while the tile unit multiplies the next
// one (GEGLU of 4096 rows 1.09 times as fast, linear layers 1.02 to 1.18 times).
//
// A pair is two strips: 32 rows of x, or the columns of a tile. So x is read once, and not written split where it has
// more rows than the weight: splitting it for all columns beforehand cost the whole gain with 320 features.
//
// A core multiplies 32 x 32 numbers a step in 384 cycles; of what it loads for that, 6 KB come out of the L2 cache, and
// one pair in kMaxPairs out of L3. Splitting takes 10 % of the time with 8192 rows and 320 features; 20 % with 512 and
// 1280, where the weights come from memory. Prefetching them during the products before cost 5 to 20 %.
#pragma once

#include "../gemm.h"
#include "tiles.h"

#if defined(__AMX_BF16__)
namespace gafext::GAFEXT_ISA {
namespace {

template <typename T, typename Layer>
class AmxLinear {
 public:
  explicit AmxLinear(const Layer& layer) : layer_(layer), args_(layer.args) {
    const int64_t row_pairs = ceil_div(args_.rows, kBlock);
    weight_is_shared_ = layer.tiles() < row_pairs;
    shared_pairs_ = weight_is_shared_ ? layer.tiles() : row_pairs;
    own_pairs_ = weight_is_shared_ ? row_pairs : layer.tiles();
    steps_ = ceil_div(args_.in_features, kTileDepth);
    chunk_ = ceil_div(steps_, ceil_div(steps_, kChunk));
  }

  // False where a number is beyond what AMX multiplies like float32; the result is then unfinished.
  bool run() {
    const int64_t most = max_of(1, min_of(shared_pairs_, kMaxSharedWords / pair_words(steps_)));
    const Plan plan(own_pairs_, most);
    own_words_ = plan.most_pairs() * pair_words(chunk_);
    const int64_t sums = chunk_ < steps_ ? plan.block * plan.most_pairs() * kBlock * kBlock : 0;
    shared_ = reinterpret_cast<uint32_t*>(scratch(most * pair_words(steps_) + max_threads() * (own_words_ + sums)));
    uint32_t* own = shared_ + most * pair_words(steps_);
    for (int64_t first = 0; first < shared_pairs_ && fits_; first += most) {
      const int64_t count = min_of(most, shared_pairs_ - first);
      parallel_for(count, [&](int64_t, int64_t pair) {
        split_pair(weight_is_shared_, first + pair, 0, steps_, shared_ + pair * pair_words(steps_));
      });
      parallel_for(plan.panels * ceil_div(count, plan.block), [&](int64_t thread, int64_t unit) {
        const int64_t begin = unit / plan.panels * plan.block;
        multiply(first, begin, min_of(count, begin + plan.block), plan.panel(unit), own + thread * (own_words_ + sums));
      });
    }
    return fits_;
  }

 private:
  static constexpr int64_t kMaxPairs = 6;
  static constexpr int64_t kChunk = 20;  // steps: a pair takes 123 KB, and longer chains of sums round more
  static constexpr int64_t kMaxSharedWords = int64_t{6} << 20;  // at a time: 24 MB
  static constexpr int64_t kFewPairs = 8;  // shared, of a unit, below which splitting its own shows

  struct Panel {
    int64_t first, pairs;
  };

  // Panels of own pairs and blocks of shared ones, so many that no thread is left without a unit.
  struct Plan {
    int64_t pairs, panels, block;

    Plan(int64_t own_pairs, int64_t shared_pairs) : pairs(own_pairs) {
      const int64_t enough = 4 * max_threads();
      panels = min_of(pairs, max_of(enough, round_up(ceil_div(pairs, kMaxPairs), max_threads())));
      block = max_of(min_of(kFewPairs, shared_pairs), ceil_div(shared_pairs, ceil_div(enough, panels)));
    }
    int64_t most_pairs() const { return ceil_div(pairs, panels); }
    Panel panel(int64_t unit) const {
      const int64_t p = unit % panels, first = p * pairs / panels;
      return {first, (p + 1) * pairs / panels - first};
    }
  };

  static int64_t pair_words(int64_t steps) { return 2 * steps * kStepWords; }

  // Two items, one per operand: given as those of the shared and the own operand, named as those of x and the weight.
  template <typename Item>
  struct Operands {
    Item x, weight;
  };
  template <typename Item>
  Operands<Item> operands(const Item& shared, const Item& own) const {
    return weight_is_shared_ ? Operands<Item>{own, shared} : Operands<Item>{shared, own};
  }

  // `steps` steps of a pair of the weight, or of x.
  void split_pair(bool of_weight, int64_t pair, int64_t step, int64_t steps, uint32_t* to) {
    const int64_t k = step * kTileDepth, depth = min_of(steps * kTileDepth, args_.in_features - k);
    const int64_t stride = of_weight ? args_.weight_stride : args_.x_stride;
    const T* from = static_cast<const T*>(of_weight ? args_.weight : args_.x) + k;
    for (int64_t half = 0; half < 2; ++half, to += steps * kStepWords) {
      Range range;
      if (of_weight) {
        const WeightRows rows = layer_.weight_rows(pair, half);
        split_columns(to, from + rows.first * stride, stride, rows.count, depth, range);
      } else {
        const int64_t row = pair * kBlock + half * kTileSide;
        split_rows(to, from + row * stride, stride, args_.rows - row, depth, 1.0f, range);
      }
      if (!range.fits()) __atomic_store_n(&fits_, false, __ATOMIC_RELAXED);
    }
  }

  // A product whose tiles are multiplied: its sums are taken up during the next product.
  struct Product {
    Operands<int64_t> pairs;
    const float* chain;  // the sums over a chunk of steps, stored since the next product began
    float* sums;         // over the chunks before, where there are several
    bool is_first, is_last;
  };
  static constexpr int64_t kPieceRows = 2, kPieces = kBlock / kPieceRows;

  // Shared pairs [begin, end) of those from `first` on, times a panel.
  void multiply(int64_t first, int64_t begin, int64_t end, Panel panel, uint32_t* own) {
    const TileState tiles_are_ours;
    TermProducts<kFloat32Terms> products;
    alignas(64) float chain[kBlock * kBlock];
    Product product = {};
    const auto take_up = [&](int64_t piece) { take_up_rows(product, piece * kPieceRows); };
    for (int64_t step = 0; step < steps_; step += chunk_) {
      const int64_t steps = min_of(chunk_, steps_ - step);
      for (int64_t p = 0; p < panel.pairs; ++p) {
        split_pair(!weight_is_shared_, panel.first + p, step, steps, own + p * pair_words(steps));
      }
      float* sums = reinterpret_cast<float*>(own + own_words_);
      for (int64_t q = begin; q < end; ++q) {
        const Strips shared{shared_ + q * pair_words(steps_) + step * kStepWords, steps_ * kStepWords};
        for (int64_t p = 0; p < panel.pairs; ++p) {
          const auto [x, weight] = operands(shared, {own + p * pair_words(steps), steps * kStepWords});
          Spread pieces{take_up, 0, product.chain == nullptr ? 0 : kPieces, steps * products.kTurns};
          products.multiply<2>(x, weight, steps, chain, kBlock, pieces);
          pieces.rest();
          product = {operands(first + q, panel.first + p), chain, sums, step == 0, step + steps == steps_};
          if (chunk_ < steps_) sums += kBlock * kBlock;
        }
      }
    }
    products.finish();
    for (int64_t piece = 0; piece < kPieces; ++piece) take_up(piece);
  }

  // kPieceRows rows of a product from `first` on.
  __attribute__((noinline)) void take_up_rows(const Product& product, int64_t first) const {
    const float* from = product.chain + first * kBlock;
    if (chunk_ < steps_) {
      float* sums = product.sums + first * kBlock;
      for (int64_t i = 0; i < kPieceRows * kBlock; i += kLanes) {
        store(sums + i, product.is_first ? load(from + i) : load(sums + i) + load(from + i));
      }
      from = sums;
    }
    const int64_t row = product.pairs.x * kBlock + first, rows = min_of(kPieceRows, args_.rows - row);
    if (product.is_last && rows > 0) layer_.write(row, rows, product.pairs.weight, from);
  }

  const Layer& layer_;
  decltype(Layer::args) args_;
  int64_t steps_, chunk_;  // of the sum, and at a time
  int64_t shared_pairs_, own_pairs_;
  bool weight_is_shared_;
  int64_t own_words_;  // of a thread
  uint32_t* shared_ = nullptr;
  bool fits_ = true;
};

}  // namespace
}  // namespace gafext::GAFEXT_ISA
#endif
