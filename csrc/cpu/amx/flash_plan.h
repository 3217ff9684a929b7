// How flash_attention.h cuts a problem, the memory of a thread, and the chunks of its work.
#pragma once

#include "../flash_tiles.h"
#include "tiles.h"

#if defined(__AMX_BF16__)
namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kFold = kMaxGroupRows, kFolds = kBlock / kFold;  // rows whose lanes are folded together

// How a problem is cut.
struct AmxPlan {
  static constexpr int64_t kMaxChunk = 128;            // keys whose scores exist at a time
  static constexpr int64_t kMaxRows = 1024;            // of a block, which splits its keys once
  static constexpr int64_t kMaxAccumulator = 1 << 17;  // numbers of O: four times as many slow heads of 512 by a tenth
  static constexpr int64_t kFewRows = 96;              // to share out a head among threads
  static constexpr int64_t kFewKeys = 4;               // beyond the last whole step, to multiply on vectors

  int64_t in_steps, beyond;  // keys
  int64_t depth, columns;    // steps over head_dim, strips of it
  int64_t line;              // of O, in whole products
  int64_t step_words;        // of one strip
  int64_t keys, chunk;       // of a tile, of a chunk, in whole steps
  int64_t rows, row_blocks;  // of a block, in whole groups; blocks of a head

  AmxPlan(const FlashAttentionArgs& args, int terms) : step_words(GAFEXT_ISA::step_words(terms)) {
    beyond = keys_beyond(args);
    in_steps = args.key_length - beyond;
    depth = ceil_div(args.head_dim, kTileDepth);
    columns = ceil_div(args.head_dim, kTileSide);
    line = round_up(columns, 2) * kTileSide;
    const int64_t key_bytes = (depth * kTileDepth + columns * kTileSide) * 2 * terms;
    const int64_t most_keys = l2_bytes() * 3 / 8 / key_bytes / kMaxChunk * kMaxChunk;
    const int64_t tiles = ceil_div(in_steps, max_of(most_keys, kMaxChunk));
    keys = round_up(ceil_div(in_steps, tiles), kTileDepth);
    chunk = round_up(ceil_div(keys, ceil_div(keys, kMaxChunk)), kTileDepth);

    const int64_t enough = ceil_div(4 * max_threads(), args.batch * args.heads);
    const int64_t fewest = ceil_div(args.query_length, min_of(kMaxRows, kMaxAccumulator / line));
    const int64_t most = max_of(fewest, min_of(enough, args.query_length / kFewRows));
    rows = round_up(ceil_div(args.query_length, most), kBlock);
    row_blocks = ceil_div(args.query_length, rows);
  }

  static int64_t keys_beyond(const FlashAttentionArgs& args) {
    const int64_t beyond = args.key_length % kTileDepth;
    return !args.is_causal && args.key_length > kTileDepth && beyond <= kFewKeys ? beyond : 0;
  }
};

// One thread's memory. The numbers of a row lie where fold_rows leaves them.
struct AmxMemory {
  float *scores[2], *alpha[2], *sums, *accumulator, *max, *sum, *totals, *end;
  uint32_t *weights[2], *query, *keys, *values;

  AmxMemory(const AmxPlan& plan, float* memory) {
    const auto take = [&](int64_t floats) { return memory += floats, memory - floats; };
    const auto take_words = [&](int64_t words) { return reinterpret_cast<uint32_t*>(take(words)); };
    const int64_t groups = plan.rows / kBlock;
    for (float*& buffer : scores) buffer = take(kBlock * score_line(plan));
    sums = take(kBlock * plan.line);
    accumulator = take(plan.rows * plan.line);
    max = take(groups * kFolds * kGroupLanes);
    sum = take(groups * kFolds * kGroupLanes);
    for (float*& buffer : alpha) buffer = take(kFolds * kGroupLanes);
    totals = take(kFold * kLanes);
    query = take_words(2 * plan.depth * plan.step_words);
    for (uint32_t*& buffer : weights) buffer = take_words(2 * plan.chunk / kTileDepth * plan.step_words);
    keys = take_words(plan.keys / kTileSide * plan.depth * plan.step_words);
    values = take_words(plan.columns * (plan.keys / kTileDepth) * plan.step_words);
    end = memory;
  }
  static int64_t score_line(const AmxPlan& plan) { return plan.chunk + kLanes; }
};

// A group of query rows against a chunk of keys.
struct AmxChunk {
  int64_t row, rows;       // of the block; 0 rows: no chunk
  int64_t key, keys;       // of the tile
  int64_t diagonal;        // keys of the chunk that the first row sees, each further row one more
  bool is_first, is_last;  // of the rows' chunks
  int parity;              // of chunks: whose memory it has

  int64_t folds() const { return ceil_div(rows, kFold); }
  int64_t steps() const { return ceil_div(keys, kTileDepth); }
};

}  // namespace
}  // namespace gafext::GAFEXT_ISA
#endif
