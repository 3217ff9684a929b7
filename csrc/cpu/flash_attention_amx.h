// Flash attention on AMX tiles (amx.h): the algorithm of flash_attention.cpp with both products split.
//
//   keys, values  of a key tile, split as right operands: 12 bytes a number       L2 cache, 3/8 of it
//   for each group of 32 query rows, split; for each chunk of keys:
//     scores   S = Q K^T in AMX tiles, masked                                     [32, chunk]
//     softmax  running maximum m, sum l; P = 2^(S - m) is split as it is made     [2 strips, steps]
//     values   O = alpha O + P V                                                  [rows, D]
//
// With 1024 keys and heads of 64 the products take 61 % of the time, softmax and splitting P 20 %, splitting the inputs
// 10 %. They hardly overlap: softmax of one chunk between the products of the next is left to do.
#pragma once

#include "amx.h"
#include "flash_tiles.h"

#if defined(__AMX_BF16__)
namespace gafext::GAFEXT_ISA {
namespace {

template <typename T>
class SplitAttention {
 public:
  // Of 4 x 5 heads of 64: 1.25 times as fast as AVX-512 with 1024 keys, no faster with 257, 0.7 times with 77. Heads of
  // 128 gain as much with 256.
  static bool pays(const FlashAttentionArgs& args) {
    return args.key_length * args.head_dim >= 32768 && args.query_length >= 256;
  }

  explicit SplitAttention(const FlashAttentionArgs& args) : args_(args) {
    depth_ = ceil_div(args.head_dim, kTileDepth);
    columns_ = ceil_div(args.head_dim, kTileSide);
    const int64_t key_bytes = (depth_ * kTileDepth + columns_ * kTileSide) * 6;
    const int64_t most_keys = l2_bytes() * 3 / 8 / key_bytes / kMaxChunk * kMaxChunk;
    const int64_t tiles = ceil_div(args.key_length, max_of(most_keys, kMaxChunk));
    keys_ = round_up(ceil_div(args.key_length, tiles), kTileDepth);

    const int64_t enough = ceil_div(4 * max_threads(), args.batch * args.heads);
    const int64_t fewest = ceil_div(args.query_length, kMaxRows);
    const int64_t blocks = max_of(fewest, min_of(enough, args.query_length / kFewRows));
    rows_ = round_up(ceil_div(args.query_length, blocks), kBlock);
    blocks_ = ceil_div(args.query_length, rows_);
  }

  // False where a number is beyond what AMX multiplies like float32; the result is then unfinished.
  bool run() {
    const Memory sizes(*this, nullptr);
    const int64_t thread_floats = sizes.end - static_cast<float*>(nullptr);
    float* memory = scratch(max_threads() * thread_floats);
    parallel_for(args_.batch * args_.heads * blocks_, [&](int64_t thread, int64_t unit) {
      if (__atomic_load_n(&fits_, __ATOMIC_RELAXED)) attend(unit, Memory(*this, memory + thread * thread_floats));
    });
    return fits_;
  }

 private:
  static constexpr int64_t kMaxChunk = 128;  // keys whose scores exist at a time
  static constexpr int64_t kScoreLine = kMaxChunk + kLanes;
  static constexpr int64_t kMaxRows = 1024;                                 // of a block, which splits its keys once
  static constexpr int64_t kFewRows = 96;                                   // to share out a head among threads
  static constexpr int64_t kFold = kMaxGroupRows, kFolds = kBlock / kFold;  // rows whose lanes are folded together

  // One thread's memory. The numbers of a row lie where fold_rows leaves them.
  struct Memory {
    float *scores, *sums, *past, *max, *sum, *alpha, *end;
    uint32_t *query, *weights, *keys, *values;

    Memory(const SplitAttention& plan, float* memory) {
      const auto take = [&](int64_t floats) { return memory += floats, memory - floats; };
      const auto take_words = [&](int64_t words) { return reinterpret_cast<uint32_t*>(take(words)); };
      const int64_t groups = plan.rows_ / kBlock;
      scores = take(kBlock * kScoreLine);
      sums = take(kBlock * kBlock);
      past = take(plan.rows_ * plan.columns_ * kTileSide);
      max = take(groups * kFolds * kGroupLanes);
      sum = take(groups * kFolds * kGroupLanes);
      alpha = take(kFolds * kGroupLanes);
      query = take_words(2 * plan.depth_ * kStepWords);
      weights = take_words(2 * kMaxChunk / kTileDepth * kStepWords);
      keys = take_words(plan.keys_ / kTileSide * plan.depth_ * kStepWords);
      values = take_words(plan.columns_ * (plan.keys_ / kTileDepth) * kStepWords);
      end = memory;
    }
  };

  // A group of query rows against a chunk of keys.
  struct Step {
    int64_t rows, keys;   // of the group, of the chunk
    int64_t diagonal;     // keys of the chunk that the first row sees, each further row one more
    int64_t first_key;    // in the tile
    int64_t value_strip;  // words
    bool is_first;        // of the group's chunks
    float *max, *sum, *past;
  };

  static int64_t lane_of(int64_t row) { return row / kFold * kGroupLanes + row % kFold; }

  void note(const Range& range) {
    if (!range.fits()) __atomic_store_n(&fits_, false, __ATOMIC_RELAXED);
  }

  void attend(int64_t unit, const Memory& memory) {
    const TileState tiles_are_ours;
    const int64_t head = unit / blocks_ % args_.heads, batch = unit / blocks_ / args_.heads;
    const auto head_of = [&](const void* base, const HeadStrides& stride) {
      return static_cast<const T*>(base) + batch * stride.batch + head * stride.head;
    };
    const int64_t begin = unit % blocks_ * rows_, rows = min_of(rows_, args_.query_length - begin);
    const int64_t keys = args_.is_causal ? min_of(args_.key_length, begin + rows) : args_.key_length;
    const T* query = head_of(args_.query, args_.query_stride) + begin * args_.query_stride.row;
    const T* key = head_of(args_.key, args_.key_stride);
    const T* value = head_of(args_.value, args_.value_stride);
    T* out = const_cast<T*>(head_of(args_.out, args_.out_stride)) + begin * args_.out_stride.row;
    for (int64_t first = 0; first < keys; first += keys_) {
      const int64_t count = min_of(keys_, keys - first);
      split_tile(key + first * args_.key_stride.row, value + first * args_.value_stride.row, count, memory);
      for (int64_t row = 0; row < rows; row += kBlock) {
        const int64_t group_rows = min_of(kBlock, rows - row);
        split_query(query + row * args_.query_stride.row, group_rows, memory);
        attend_group(row, group_rows, first, count, args_.is_causal ? begin + row + 1 - first : count, memory);
        if (first + count >= keys) write_rows(out + row * args_.out_stride.row, row, group_rows, memory);
      }
    }
  }

  void split_tile(const T* key, const T* value, int64_t count, const Memory& memory) {
    const int64_t steps = ceil_div(count, kTileDepth);
    for (int64_t strip = 0; strip < 2 * steps; ++strip) {
      Range range;
      const int64_t j = strip * kTileSide;
      split_columns(memory.keys + strip * depth_ * kStepWords, key + j * args_.key_stride.row, args_.key_stride.row,
                    count - j, args_.head_dim, range);
      note(range);
    }
    for (int64_t strip = 0; strip < columns_; ++strip) {
      Range range;
      const int64_t column = strip * kTileSide;
      split_down(memory.values + strip * steps * kStepWords, value + column, args_.value_stride.row, count,
                 args_.head_dim - column, range);
      note(range);
    }
  }

  void split_query(const T* query, int64_t rows, const Memory& memory) {
    for (int64_t strip = 0; strip < 2; ++strip) {
      Range range;
      const int64_t row = strip * kTileSide;
      split_rows(memory.query + strip * depth_ * kStepWords, query + row * args_.query_stride.row,
                 args_.query_stride.row, rows - row, args_.head_dim, args_.scale * kLog2E, range);
      note(range);
    }
  }

  // Rows [row, row + rows) of the block against the tile of `count` keys that begins at key `first`, `diagonal` of
  // which its first row sees.
  void attend_group(int64_t row, int64_t rows, int64_t first, int64_t count, int64_t diagonal, const Memory& memory) {
    const int64_t seen = args_.is_causal ? min_of(count, diagonal + rows - 1) : count;
    Step step;
    const int64_t lanes = row / kBlock * kFolds * kGroupLanes;
    step.rows = rows;
    step.max = memory.max + lanes;
    step.sum = memory.sum + lanes;
    step.past = memory.past + row * columns_ * kTileSide;
    step.value_strip = ceil_div(count, kTileDepth) * kStepWords;
    for (int64_t key = 0; key < seen; key += kMaxChunk) {
      step.first_key = key;
      step.keys = min_of(kMaxChunk, seen - key);
      step.diagonal = diagonal - key;
      step.is_first = first + key == 0;
      rows > kTileSide ? attend_chunk<2>(step, memory) : attend_chunk<1>(step, memory);
    }
  }

  template <int Strips>
  void attend_chunk(const Step& step, const Memory& memory) {
    const int64_t key_strip = depth_ * kStepWords, steps = ceil_div(step.keys, kTileDepth);
    for (int64_t j = 0; j < step.keys; j += kBlock) {
      multiply_steps<Strips, 2>(memory.query, key_strip, memory.keys + (step.first_key + j) / kTileSide * key_strip,
                                key_strip, depth_, memory.scores + j, kScoreLine);
    }
    for (int64_t row = 0; row < Strips * kTileSide; row += kFold) weigh_rows(row, steps, step, memory);
    const uint32_t* values = memory.values + step.first_key / kTileDepth * kStepWords;
    int64_t strip = 0;
    for (; strip + 2 <= columns_; strip += 2) {
      multiply_steps<Strips, 2>(memory.weights, steps * kStepWords, values + strip * step.value_strip, step.value_strip,
                                steps, memory.sums, kBlock);
      add_values<2>(strip, step, memory);
    }
    if (strip == columns_) return;
    multiply_steps<Strips, 1>(memory.weights, steps * kStepWords, values + strip * step.value_strip, 0, steps,
                              memory.sums, kBlock);
    add_values<1>(strip, step, memory);
  }

  // The scores of kFold rows become split weights relative to the new maximum; max, sum and alpha move on.
  void weigh_rows(int64_t row, int64_t steps, const Step& step, const Memory& memory) {
    float* scores = memory.scores + row * kScoreLine;
    const int64_t keys = steps * kTileDepth;
    Vec folded[kFold];
    for (int64_t r = 0; r < kFold; ++r) {
      float* line = scores + r * kScoreLine;
      const int64_t seen = max_of(0, min_of(step.keys, step.diagonal + row + r));
      for (int64_t j = seen / kLanes * kLanes; j < keys; j += kLanes) {
        const Vec masked = lane_numbers(AllLanes()) < static_cast<int>(seen - j) ? load(line + j) : -kInfinity - Vec{};
        store(line + j, masked);
      }
      folded[r] = load(line);
      for (int64_t j = kLanes; j < keys; j += kLanes) folded[r] = max_of(load(line + j), folded[r]);
    }
    alignas(64) float highest[kGroupLanes], total[kGroupLanes];
    fold_rows(folded, highest, [](Vec a, Vec b) { return max_of(a, b); });
    const int64_t lane = lane_of(row);
    const Vec past = step.is_first ? broadcast(-kInfinity) : load(step.max + lane), max = max_of(load(highest), past);
    store(step.max + lane, max);
    store(highest, max);
    const Vec alpha = exp2_of(past - max);
    store(memory.alpha + lane, alpha);

    uint32_t* weights = memory.weights + row / kTileSide * steps * kStepWords;
    for (int64_t r = 0; r < kFold; ++r) {
      const float* line = scores + r * kScoreLine;
      const Vec reference = broadcast(highest[r]);
      Vec sum = {};
      for (int64_t s = 0; s < steps; ++s, line += kTileDepth) {
        const Vec lower = exp2_of(load(line) - reference), upper = exp2_of(load(line + kLanes) - reference);
        sum += lower + upper;
        BitVec terms[kTerms];
        split(lower, upper, terms);
        store_terms(weights + s * kStepWords, row % kTileSide + r, terms);
      }
      folded[r] = sum;
    }
    fold_rows(folded, total, [](Vec a, Vec b) { return a + b; });
    store(step.sum + lane, step.is_first ? load(total) : alpha * load(step.sum + lane) + load(total));
  }

  // O = alpha O + P V for `Strips` strips of columns.
  template <int Strips>
  void add_values(int64_t strip, const Step& step, const Memory& memory) {
    const int64_t line = columns_ * kTileSide;
    float* past = step.past + strip * kTileSide;
    for (int64_t r = 0; r < step.rows; ++r) {
      const Vec alpha = broadcast(memory.alpha[lane_of(r)]);
      for (int64_t c = 0; c < Strips * kTileSide; c += kLanes) {
        const Vec sums = load(memory.sums + r * kBlock + c);
        store(past + r * line + c, step.is_first ? sums : load(past + r * line + c) * alpha + sums);
      }
    }
  }

  void write_rows(T* out, int64_t row, int64_t rows, const Memory& memory) {
    const float* sum = memory.sum + row / kBlock * kFolds * kGroupLanes;
    for (int64_t r = 0; r < rows; ++r) {
      const float* past = memory.past + (row + r) * columns_ * kTileSide;
      T* to = out + r * args_.out_stride.row;
      const float factor = 1.0f / sum[lane_of(r)];
      for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
        const int64_t count = args_.head_dim - d;
        count >= kLanes ? store(to + d, load(past + d) * factor) : store_first(to + d, load(past + d) * factor, count);
      }
    }
  }

  const FlashAttentionArgs& args_;
  int64_t depth_, columns_;  // steps over head_dim, strips of it
  int64_t keys_;             // of a tile, in whole steps
  int64_t rows_, blocks_;    // of a block, in whole groups; blocks of a head
  bool fits_ = true;
};

}  // namespace
}  // namespace gafext::GAFEXT_ISA
#endif
