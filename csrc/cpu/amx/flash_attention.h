// Flash attention on AMX tiles (tiles.h): the algorithm of flash_attention.cpp with both products split.
//
//   few keys      beyond whole steps of 32, on vectors: they begin each row's m, l and O
//   keys, values  of a key tile, split as right operands: 2 bytes a term          L2 cache, 3/8 of it
//   for each group of 32 query rows, split; for each chunk of keys:
//     scores   S = Q K^T in AMX tiles                                             [32, chunk], twice
//     weigh    masks, running maximum m, sum l; P = 2^(S - m) split as it is made [2 strips, steps], twice
//     values   P V in AMX tiles                                                   [32, D]
//     add      O = alpha O + P V; the last one divides by l and writes the result [rows, D]
//
// A core computes on vectors while its tile unit multiplies, as far as its reorder window reaches. So the chunks go
// through a pipeline, whose schedule stands at AmxBlock::attend_tile(). The splitting of keys and values is not hidden,
// nor are the few keys: with 257, 256 queries are 1.1 times as fast as with 288 in whole steps.
//
// float32 has scale and log2(e) folded into the queries, as in flash_attention.cpp. Half precision is exact without:
// there the softmax multiplies the scores. With heads of 64 and 1024 keys, two cores do 950 GFLOP/s in bfloat16.
//
// float32, heads of 64, 4096 keys, inputs that keep the clock: 780 cycles for 24 tile products of 16 cycles each, 540
// without the vector work, 410 of vector work alone. Random inputs lower the clock from 2.9 to 2.3 GHz.
#pragma once

#include "flash_plan.h"

#if defined(__AMX_BF16__)
namespace gafext::GAFEXT_ISA {
namespace {

// 2^x with a relative error of 1e-4, for weights that are rounded to 8 bits.
GAFEXT_INLINE Vec rough_exp2_of(Vec x) {
  const Vec fraction = bit_cast<Vec>(_mm512_reduce_ps(bit_cast<__m512>(x), 0x01));  // x - floor(x)
  Vec p = broadcast(0.07944024f);
  p = p * fraction + 0.22449434f;
  p = p * fraction + 0.69606564f;
  p = p * fraction + 1.0f;
  return bit_cast<Vec>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(x)));
}

GAFEXT_INLINE BitVec upper_halves(Vec v) { return bit_cast<BitVec>(v) & 0xffff0000; }

// A thread at work on a block of query rows of one (batch, head).
template <typename T>
class AmxBlock {
 public:
  AmxBlock(const FlashAttentionArgs& args, const AmxPlan& plan, const AmxMemory& memory, int64_t unit)
      : args_(args),
        plan_(plan),
        memory_(memory),
        score_line_(AmxMemory::score_line(plan)),
        factor_(args.scale * kLog2E),
        block_(args, plan, unit) {}

  // False where a number is beyond what AMX multiplies like float32.
  bool attend() {
    const TileState tiles_are_ours;
    if (plan_.beyond > 0) begin_with_few();
    for (first_ = 0; first_ < keys_seen(block_.rows) && fits_; first_ += plan_.keys) {
      count_ = min_of(plan_.keys, keys_seen(block_.rows) - first_);
      split_tile();
      attend_tile();
    }
    return fits_ && query_range_.fits() && max_in(largest_) <= kLargestScore;
  }

 private:
  static constexpr int kTerms = kTermsOf<T>;
  using Products = TermProducts<kTerms>;
  static constexpr int64_t kWords = step_words(kTerms);
  static constexpr bool kScalesQuery = kTerms == kFloat32Terms;
  static constexpr float kLargestScore = 65536.0f;  // after scale; beyond, a maximum's rounding would count

  // Keys that the row before `row` sees.
  int64_t keys_seen(int64_t row) const {
    return args_.is_causal ? min_of(args_.key_length, block_.begin + row) : plan_.in_steps;
  }

  // The keys beyond the last whole step are the first that each row sees.
  void begin_with_few() {
    const int64_t key_stride = args_.key_stride.row, value_stride = args_.value_stride.row;
    const T *key = block_.key + plan_.in_steps * key_stride, *value = block_.value + plan_.in_steps * value_stride;
    Range range;
    for (int64_t j = 0; j < plan_.beyond; ++j) {
      for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
        range.add(upper_halves(load_up_to(key + j * key_stride + d, args_.head_dim - d)));
        range.add(upper_halves(load_up_to(value + j * value_stride + d, args_.head_dim - d)));
      }
    }
    fits_ = range.fits();
    for (int64_t row = 0; row < block_.rows; row += kFold) {
      alignas(64) float weights[AmxPlan::kFewKeys][kGroupLanes];
      weigh_few(key, row, weights);
      for (int64_t r = row; r < min_of(row + kFold, block_.rows); ++r) {
        for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
          Vec sum = {};
          for (int64_t j = 0; j < plan_.beyond; ++j) {
            sum += weights[j][r - row] * load_up_to(value + j * value_stride + d, args_.head_dim - d);
          }
          store(memory_.accumulator + r * plan_.line + d, sum);
        }
      }
    }
  }

  GAFEXT_INLINE void weigh_few(const T* key, int64_t row, float (&weights)[AmxPlan::kFewKeys][kGroupLanes]) {
    Vec max = broadcast(-kInfinity), sum = {};
    for (int64_t j = 0; j < plan_.beyond; ++j, key += args_.key_stride.row) {
      Vec products[kFold] = {};
      for (int64_t r = 0; r < kFold; ++r) {
        const T* query = block_.query + min_of(row + r, block_.rows - 1) * args_.query_stride.row;
        for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
          products[r] += load_up_to(query + d, args_.head_dim - d) * load_up_to(key + d, args_.head_dim - d);
        }
      }
      fold_rows(products, weights[j], [](Vec a, Vec b) { return a + b; });
      store(weights[j], load(weights[j]) * factor_);
      max = max_of(load(weights[j]), max);
    }
    for (int64_t j = 0; j < plan_.beyond; ++j) {
      store(weights[j], exp2_of(load(weights[j]) - max));
      sum += load(weights[j]);
    }
    store(memory_.max + row / kFold * kGroupLanes, max);
    store(memory_.sum + row / kFold * kGroupLanes, sum);
  }

  void split_tile() {
    const int64_t steps = ceil_div(count_, kTileDepth), key_stride = args_.key_stride.row;
    const T* key = block_.key + first_ * key_stride;
    const T* value = block_.value + first_ * args_.value_stride.row;
    Range key_range, value_range;
    for (int64_t strip = 0; strip < 2 * steps; ++strip) {
      const int64_t j = strip * kTileSide;
      split_columns<kTerms>(memory_.keys + strip * plan_.depth * kWords, key + j * key_stride, key_stride, count_ - j,
                            args_.head_dim, key_range);
    }
    for (int64_t strip = 0; strip < plan_.columns; ++strip) {
      const int64_t column = strip * kTileSide;
      split_down<kTerms>(memory_.values + strip * steps * kWords, value + column, args_.value_stride.row, count_,
                         args_.head_dim - column, value_range);
    }
    fits_ = fits_ && key_range.fits() && value_range.fits();
  }

  int64_t query_pieces() const { return 2 * plan_.depth; }

  __attribute__((noinline)) void split_query(const AmxChunk& chunk, int64_t piece) {
    const int64_t strip = piece / plan_.depth, step = piece % plan_.depth, stride = args_.query_stride.row;
    const int64_t row = chunk.row + strip * kTileSide;
    split_rows<kTerms>(memory_.query + piece * kWords, block_.query + row * stride + step * kTileDepth, stride,
                       block_.rows - row, min_of(kTileDepth, args_.head_dim - step * kTileDepth),
                       kScalesQuery ? factor_ : 1.0f, query_range_);
  }

  // The tile's chunk that begins at `key`, or the next group's first.
  AmxChunk chunk_at(int64_t row, int64_t key, int parity = 0) const {
    AmxChunk chunk = {};
    chunk.parity = parity;
    for (; row < block_.rows; row += kBlock, key = 0) {
      const int64_t rows = min_of(kBlock, block_.rows - row), seen = keys_seen(row + rows) - first_;
      if (key >= min_of(count_, seen)) continue;
      chunk.row = row;
      chunk.rows = rows;
      chunk.key = key;
      chunk.keys = min_of(plan_.chunk, min_of(count_, seen) - key);
      chunk.diagonal = args_.is_causal ? block_.begin + row + 1 - first_ - key : chunk.keys;
      chunk.is_first = first_ + key == 0 && plan_.beyond == 0;
      chunk.is_last = key + chunk.keys == seen;
      break;
    }
    return chunk;
  }
  AmxChunk after(const AmxChunk& chunk) const { return chunk_at(chunk.row, chunk.key + chunk.keys, 1 - chunk.parity); }

  // The tile's chunks, one per stage. What the vector unit does lies in pieces between the products of the tile unit:
  //
  //          tile unit                      vector unit
  //   turn   scores of    then values of    adds          weighs        splits the queries of
  //   0      chunk 0      -                 -             -             chunk 1
  //   1      chunk 1      -                 -             chunk 0       chunk 2
  //   2      chunk 2      chunk 0           -             chunk 1       chunk 3
  //   n      chunk n      chunk n - 2       chunk n - 3   chunk n - 1   chunk n + 1
  //
  // Queries are split where chunk n + 1 is another group's than chunk n, and then after the scores, which read those of
  // chunk n; chunk n - 3 is added before the values overwrite its sums.
  void attend_tile() {
    AmxChunk scored = chunk_at(0, 0), weighed = {}, valued = {}, added = {};
    for (int64_t i = 0; i < query_pieces(); ++i) split_query(scored, i);
    while (scored.rows + weighed.rows + valued.rows + added.rows > 0) {
      const AmxChunk next = scored.rows > 0 ? after(scored) : AmxChunk{};
      const int64_t adds = added.folds(), weighs = weighed.folds() * (kFold + 2);
      const int64_t splits = next.rows > 0 && next.row != scored.row ? query_pieces() : 0;
      const auto do_piece = [&](int64_t piece) {
        if (piece < adds) return add(added, piece);
        if (piece < adds + weighs) return weigh(weighed, piece - adds);
        split_query(next, piece - adds - weighs);
      };
      const int64_t score_turns = ceil_div(scored.keys, kBlock) * plan_.depth * Products::kTurns;
      const int64_t value_turns = ceil_div(plan_.columns, 2) * valued.steps() * Products::kTurns;
      const int64_t even = (adds + weighs + splits) * score_turns / max_of(1, score_turns + value_turns);
      const int64_t cut = max_of(adds, min_of(even, adds + weighs));
      Spread early{do_piece, 0, cut, score_turns}, late{do_piece, cut, adds + weighs + splits, value_turns};
      scored.rows > 0 ? score(scored, early) : products_.finish();
      early.rest();
      if (valued.rows > 0) values(valued, late);
      late.rest();
      added = valued, valued = weighed, weighed = scored, scored = next;
    }
  }

  template <typename VectorWork>
  void score(const AmxChunk& chunk, VectorWork& vector_work) {
    const int64_t strip = plan_.depth * kWords;
    const uint32_t* keys = memory_.keys + chunk.key / kTileSide * strip;
    for (int64_t j = 0; j < chunk.keys; j += kBlock) {
      products_.template multiply<2>({memory_.query, strip}, {keys + j / kTileSide * strip, strip}, plan_.depth,
                                     memory_.scores[chunk.parity] + j, score_line_, vector_work);
    }
  }

  // The scores become split weights relative to the new running maximum; max, sum and alpha are updated. kFold rows are
  // kFold + 2 pieces: their maxima, each row, their sums.
  __attribute__((noinline)) void weigh(const AmxChunk& chunk, int64_t piece) {
    float* scores = memory_.scores[chunk.parity];
    const int64_t row = piece / (kFold + 2) * kFold, i = piece % (kFold + 2);
    const int64_t lane = row / kFold * kGroupLanes, at = chunk.row / kBlock * kFolds * kGroupLanes + lane;
    if (i == 0) return find_maxima(chunk, scores + row * score_line_, row, at);
    if (i <= kFold) return weigh_row(chunk, scores + (row + i - 1) * score_line_, row + i - 1, at + i - 1);
    Vec rows[kFold];
    for (int64_t r = 0; r < kFold; ++r) rows[r] = load(memory_.totals + r * kLanes);
    alignas(64) float total[kGroupLanes];
    fold_rows(rows, total, [](Vec a, Vec b) { return a + b; });
    const Vec before = chunk.is_first ? Vec{} : load(memory_.alpha[chunk.parity] + lane) * load(memory_.sum + at);
    store(memory_.sum + at, before + load(total));
  }

  GAFEXT_INLINE void find_maxima(const AmxChunk& chunk, float* scores, int64_t row, int64_t at) {
    const int64_t keys = chunk.steps() * kTileDepth;
    Vec highest[kFold];
    for (int64_t r = 0; r < kFold; ++r, scores += score_line_) {
      const int64_t seen = max_of(0, min_of(chunk.keys, chunk.diagonal + row + r));
      for (int64_t j = seen / kLanes * kLanes; j < keys; j += kLanes) {
        const Vec masked =
            lane_numbers(AllLanes()) < static_cast<int>(seen - j) ? load(scores + j) : -kInfinity - Vec{};
        store(scores + j, masked);
      }
      highest[r] = load(scores);
      for (int64_t j = kLanes; j < keys; j += kLanes) highest[r] = max_of(load(scores + j), highest[r]);
    }
    alignas(64) float folded[kGroupLanes];
    fold_rows(highest, folded, [](Vec a, Vec b) { return max_of(a, b); });
    const Vec before = chunk.is_first ? broadcast(-kInfinity) : load(memory_.max + at);
    const Vec max = max_of(kScalesQuery ? load(folded) : load(folded) * factor_, before);
    if constexpr (!kScalesQuery) largest_ = max_of(largest_, max_of(max, -max));
    store(memory_.max + at, max);
    store(memory_.alpha[chunk.parity] + row / kFold * kGroupLanes, exp2_of(before - max));
  }

  GAFEXT_INLINE Vec weight(Vec score, Vec max) const {
    if constexpr (kScalesQuery) return exp2_of(score - max);
    const Vec exponent = score * factor_ - max;
    return kTerms == 1 ? rough_exp2_of(exponent) : exp2_of(exponent);
  }

  GAFEXT_INLINE void weigh_row(const AmxChunk& chunk, const float* scores, int64_t row, int64_t at) {
    const int64_t steps = chunk.steps();
    uint32_t* weights = memory_.weights[chunk.parity] + row / kTileSide * steps * kWords;
    const Vec max = broadcast(memory_.max[at]);
    Vec sum = {};
    for (int64_t s = 0; s < steps; ++s, scores += kTileDepth) {
      const Vec lower = weight(load(scores), max), upper = weight(load(scores + kLanes), max);
      sum += lower + upper;
      BitVec terms[kTerms];
      split(lower, upper, terms);
      store_terms(weights + s * kWords, row % kTileSide, terms);
    }
    store(memory_.totals + row % kFold * kLanes, sum);
  }

  template <typename VectorWork>
  void values(const AmxChunk& chunk, VectorWork& vector_work) {
    const Strips weights{memory_.weights[chunk.parity], chunk.steps() * kWords};
    const int64_t value_strip = ceil_div(count_, kTileDepth) * kWords;
    const uint32_t* values = memory_.values + chunk.key / kTileDepth * kWords;
    const auto multiply = [&](int64_t strip, auto columns) {
      products_.template multiply<columns.value>(weights, {values + strip * value_strip, value_strip}, chunk.steps(),
                                                 memory_.sums + strip * kTileSide, plan_.line, vector_work);
    };
    int64_t strip = 0;
    for (; strip + 2 <= plan_.columns; strip += 2) multiply(strip, PanelWidth<2>());
    if (strip < plan_.columns) multiply(strip, PanelWidth<1>());
  }

  // O = alpha O + P V for a fold's rows.
  __attribute__((noinline)) void add(const AmxChunk& chunk, int64_t fold) {
    const int64_t line = plan_.line, first = fold * kFold, end = min_of(first + kFold, chunk.rows);
    const float* sum = memory_.sum + (chunk.row / kBlock * kFolds + fold) * kGroupLanes;
    for (int64_t r = first; r < end; ++r) {
      const Vec alpha = broadcast(memory_.alpha[chunk.parity][fold * kGroupLanes + r - first]);
      const Vec factor = broadcast(chunk.is_last ? 1.0f / sum[r - first] : 1.0f);
      const float* sums = memory_.sums + r * line;
      float* accumulator = memory_.accumulator + (chunk.row + r) * line;
      T* out = block_.out + (chunk.row + r) * args_.out_stride.row;
      for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
        const Vec added = chunk.is_first ? load(sums + d) : load(accumulator + d) * alpha + load(sums + d);
        const int64_t count = args_.head_dim - d;
        if (!chunk.is_last) {
          store(accumulator + d, added);
        } else if (count >= kLanes) {
          store(out + d, added * factor);
        } else {
          store_first(out + d, added * factor, count);
        }
      }
    }
  }

  const FlashAttentionArgs& args_;
  const AmxPlan& plan_;
  const AmxMemory memory_;
  const int64_t score_line_;
  const float factor_;
  const Block<T> block_;
  int64_t first_, count_;  // keys of the tile
  Products products_;
  Range query_range_;
  Vec largest_ = {};  // magnitude of the rows' maxima
  bool fits_ = true;
};

template <typename T>
class AmxAttention {
 public:
  // Measured against AVX-512 on two cores, heads of 64 unless named.
  static bool pays(const FlashAttentionArgs& args) {
    const int64_t queries = args.query_length, keys = args.key_length, head_dim = args.head_dim;
    if (kTermsOf<T> < kFloat32Terms && !(args.scale > 0.0f)) return false;  // the largest score must weigh most
    switch (kTermsOf<T>) {
      case 1:  // 64 queries: 2.2 times as fast with 257 keys, 1.5 times with 77; 12: 0.8 times with 16 keys
        return queries >= 16 && keys >= 24;
      case 2:  // 1.9 times with 1024 and 1024, 1.3 times with 77 and 256, 0.9 times with 77 and 64
        if (head_dim < 64) return queries >= 128 && keys >= 128;
        return queries >= 128 ? keys >= 64 : queries >= 64 && keys >= 256;
      default:  // 1.4 times with 1024 and 1024, 1.15 times with 256 and 256, 1.1 with 257 and 256, 0.8 with 77 keys
        const int64_t beyond = AmxPlan::keys_beyond(args);
        const bool is_whole = keys % kTileDepth == beyond && (beyond == 0 || head_dim % kTileDepth == 0);
        const bool fits_tiles = queries >= 1024 || is_whole;
        const bool is_middling = keys >= 256 && head_dim >= 64 && fits_tiles;
        return queries >= 256 && (is_middling || keys * head_dim >= 32768);
    }
  }

  explicit AmxAttention(const FlashAttentionArgs& args) : args_(args), plan_(args, kTermsOf<T>) {}

  // False where a number is beyond what AMX multiplies like float32; the result is then unfinished.
  bool run() {
    const int64_t thread_floats = AmxMemory(plan_, nullptr).end - static_cast<float*>(nullptr);
    float* memory = scratch(max_threads() * thread_floats);
    bool fits = true;
    parallel_for(args_.batch * args_.heads * plan_.row_blocks, [&](int64_t thread, int64_t unit) {
      if (!__atomic_load_n(&fits, __ATOMIC_RELAXED)) return;
      AmxBlock<T> block(args_, plan_, AmxMemory(plan_, memory + thread * thread_floats), unit);
      if (!block.attend()) __atomic_store_n(&fits, false, __ATOMIC_RELAXED);
    });
    return fits;
  }

 private:
  const FlashAttentionArgs& args_;
  const AmxPlan plan_;
};

}  // namespace
}  // namespace gafext::GAFEXT_ISA
#endif
