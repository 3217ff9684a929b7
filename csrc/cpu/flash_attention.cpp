// Attention by tiles, with an online softmax (FlashAttention, arXiv 2205.14135, algorithm 1).
//
// A unit of work is a block of query rows of one (batch, head). A thread that claims one walks over the keys in tiles:
//
//   pack      the tile's keys transposed and its values, both float32, in panels     L2 cache, 128 KiB each
//             (bfloat16 where pairs.h multiplies it: words of two features, and of two keys)
//             (of few rows: the values stay where they are)
//   for each group of up to kTileRows query rows:
//     scores  S = Q K^T, a panel of keys at a time in registers, with the rows'
//             maxima and the mask; meanwhile rows needed next are prefetched         L1 cache, [kTileRows, keys]
//             (a last key that would be alone in its vector: products of rows)
//     softmax running maximum m, sum l; S becomes P = 2^(S - m)
//     values  O = alpha O + P V, a panel of columns at a time in registers           L2 cache, [rows, D]
//
// The last tile divides by l and writes straight to the result, so O exists only where there are several tiles. Scale
// and log2(e) are folded into Q. A thread's memory is bounded, whatever the lengths: below 2.5 MiB. Each row's
// arithmetic is the same however rows are distributed, so the result does not depend on the number of threads; but with
// a causal mask, infinities and NaN of later values reach the rows before them in a group, and bfloat16 values of which
// a tile has none above 2^-60 are multiplied in float32, with all others of the call.
#include "amx/flash_attention.h"

#include "flash_tiles.h"

namespace gafext::GAFEXT_ISA {
namespace {

// Of a key tile. Keys and values of 128 KiB each leave room for O in an L2 cache of 1 MiB; smaller tiles touch O more
// often.
constexpr int64_t kTileFloats = 32768;

// The longest sum of products in one register: 1024 terms had 2.7 times the error of PyTorch's operation, 272 have 1.1
// times. The 257 image tokens fit.
constexpr int64_t kChain = 272;
static_assert(kMaxTileKeys <= 2 * kChain);

// Of a block, which packs its tiles once: 1024 rows are 2% faster than 512 over several tiles, and O is 256 KiB then. A
// single tile has no O.
constexpr int64_t kMaxRows = 1024;
constexpr int64_t kMaxRowsOfOneTile = 8192;
constexpr int64_t kMinRows = 96;  // to share out a head among threads

// A single tile is cut finer as long as blocks have so many rows, for which packing is 2% of the time: 40 units rather
// than 20 on two threads are 6% faster with 77 keys, as threads end together.
constexpr int64_t kFineRows = 512;

// Blocks of up to so many rows read float32 values where they are. For 64 rows copying them is 5% of the time (257
// keys); 256 rows are as fast either way.
constexpr int64_t kRowsInPlace = 128;

// How a problem is cut.
struct Plan {
  int64_t rows;              // of a block
  int64_t row_blocks;        // in query_length
  int64_t groups;            // in a block
  int64_t keys;              // of a tile, in whole vectors
  int64_t head_floats;       // head_dim in whole vectors
  int64_t accumulator_rows;  // of O
  int64_t scratch_floats;
  bool values_in_place;
};

Plan make_plan(const FlashAttentionArgs& args) {
  Plan plan;
  plan.head_floats = round_up(args.head_dim, kLanes);

  const int64_t max_keys = max_of(64, min_of(kMaxTileKeys, kTileFloats / plan.head_floats / kLanes * kLanes));
  const int64_t tiles = max_of(1, ceil_div(args.key_length, max_keys));
  plan.keys = round_up(max_of(1, ceil_div(args.key_length, tiles)), kLanes);

  const int64_t enough = ceil_div(4 * max_threads(), args.batch * args.heads);
  const int64_t fewest = ceil_div(args.query_length, tiles == 1 ? kMaxRowsOfOneTile : kMaxRows);
  plan.row_blocks = max_of(fewest, min_of(enough, args.query_length / kMinRows));
  if (tiles == 1) {
    const int64_t even = ceil_div(20 * max_threads(), args.batch * args.heads);
    plan.row_blocks = max_of(plan.row_blocks, min_of(even, args.query_length / kFineRows));
  }
  plan.rows = ceil_div(args.query_length, plan.row_blocks);
  plan.row_blocks = ceil_div(args.query_length, plan.rows);
  plan.values_in_place = args.dtype == DType::kFloat32 && plan.rows <= kRowsInPlace && args.head_dim % kLanes == 0 &&
                         args.head_dim <= kTileVectors * kLanes;
  plan.groups = ceil_div(plan.rows, kTileRows);
  plan.accumulator_rows = tiles == 1 ? kTileRows : plan.groups * kTileRows;

  plan.scratch_floats = kTileRows * (kQueryStride + kScoreStride) + 2 * plan.groups * kGroupLanes +
                        (2 * plan.keys + plan.accumulator_rows) * plan.head_floats;
  return plan;
}

// One thread's memory. Every part begins at a whole vector.
struct Scratch {
  float* query;        // [kTileRows, kQueryStride]
  float* scores;       // [kTileRows, kScoreStride]
  float *max, *sum;    // [groups, kGroupLanes]
  float* keys;         // panels of up to kTileVectors vectors of keys: [head_dim, panel]; a lone key: [head_dim]
  float* values;       // panels of up to kTileVectors vectors of columns: [keys, panel]; unused in place
  float* accumulator;  // [accumulator_rows, head_floats]: O

  Scratch(const Plan& plan, float* memory) {
    query = memory;
    scores = query + kTileRows * kQueryStride;
    max = scores + kTileRows * kScoreStride;
    sum = max + plan.groups * kGroupLanes;
    keys = sum + plan.groups * kGroupLanes;
    values = keys + plan.keys * plan.head_floats;
    accumulator = values + plan.keys * plan.head_floats;
  }
};

// A group of query rows against a tile of keys.
struct Pass {
  int64_t keys;              // of the tile
  int64_t vectors;           // of its keys in panels; what is left is a lone key
  int64_t seen;              // of which the group's last row sees this many
  int64_t diagonal;          // and, with a causal mask, its first row, each further row one more
  bool is_last;              // of the group's tiles
  float *max, *sum;          // [kGroupLanes], of the tiles before
  const float* accumulator;  // [rows, head_floats], of the tiles before; null at the first
  float* out;                // [rows, out_stride], the accumulator with this tile
  int64_t out_stride;
  const float* values;  // [keys, value_stride], read in place; null where they are packed
  int64_t value_stride;
  float scale;  // of scores of words
};

// The scores become weights relative to the new running maximum, rounded to bfloat16 at the row's beginning if Number is
// a word; max and sum are updated. alpha[r] rescales row r's accumulator to the new maximum, factor[r] normalises it at
// the last tile.
template <typename Number>
void softmax_rows(float* scores, int rows, Vec (&highest)[kMaxGroupRows], const Pass& pass, float* alpha,
                  float* factor) {
  alignas(64) float reference[kGroupLanes], total[kGroupLanes];
  fold_rows(highest, reference, [](Vec a, Vec b) { return max_of(a, b); });
  for (int64_t i = 0; i < kGroupLanes; i += kLanes) {
    const Vec old_max = load(pass.max + i), new_max = max_of(load(reference + i), old_max);
    store(pass.max + i, new_max);
    // All of them -inf: any finite reference makes every weight 0, where -inf - -inf would be NaN.
    const Vec finite = new_max == -kInfinity ? Vec{} : new_max;
    store(reference + i, finite);
    store(alpha + i, exp2_of(old_max - finite));
  }

  Vec sums[kMaxGroupRows] = {};
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kScoreStride;
    const Vec zero = broadcast(reference[r]);
    for (int64_t j = 0; j < pass.seen; j += kLanes) {
      const Vec weight = exp2_of(load(row + j) - zero);
#if defined(GAFEXT_HAS_PAIRS)
      if constexpr (!kIsFloat<Number>) {
        store_rounded_pairs(reinterpret_cast<uint16_t*>(row) + j, weight);
        sums[r] += weight;
        continue;
      }
#endif
      store(row + j, weight);
      sums[r] += weight;
    }
  }
  fold_rows(sums, total, [](Vec a, Vec b) { return a + b; });
  for (int64_t i = 0; i < kGroupLanes; i += kLanes) {
    const Vec sum = load(alpha + i) * load(pass.sum + i) + load(total + i);
    store(pass.sum + i, sum);
    const Vec inverse = sum == 0.0f ? Vec{} : 1.0f / sum;  // no key, or every score -inf: zeros
    store(factor + i, pass.is_last ? inverse : broadcast(1.0f));
  }
}

template <typename Number, int Rows>
void attend_rows(const Scratch& scratch, const Pass& pass, int64_t head_dim, RowsAhead& ahead) {
  constexpr int64_t kNumbers = kIsFloat<Number> ? 1 : 2;  // of an element
  const int64_t depth = ceil_div(head_dim, kNumbers);
  const auto* query = reinterpret_cast<const Number*>(scratch.query);
  const auto* weights = reinterpret_cast<const Number*>(scratch.scores);
  Vec highest[kMaxGroupRows];
  for (Vec& row : highest) row = broadcast(-kInfinity);
  // First, so that its sums across lanes are under way while the panels multiply.
  if (const int64_t key = pass.vectors * kLanes; key < pass.seen) {
    score_key<Rows>(scratch.query, scratch.keys + key * head_dim, head_dim, pass.diagonal - key, scratch.scores + key,
                    highest);
  }
  for_each_panel(pass.vectors, [&](int64_t first, auto width) {
    const int64_t key = first * kLanes;
    if (key >= pass.seen) return;
    const auto* keys = reinterpret_cast<const Number*>(scratch.keys) + key * depth;
    score_panel<Rows, width.value>(query, keys, depth, pass.scale, pass.keys - key, pass.diagonal - key,
                                   scratch.scores + key, highest, ahead);
  });

  alignas(64) float alpha[kGroupLanes], factor[kGroupLanes];
  softmax_rows<Number>(scratch.scores, Rows, highest, pass, alpha, factor);

  constexpr float ones[kTileRows] = {1, 1, 1, 1, 1, 1};
  const int64_t head_vectors = ceil_div(head_dim, kLanes);
  for_each_panel(head_vectors, [&](int64_t first, auto width) {
    constexpr int64_t kPanel = width.value * kLanes;
    const int64_t column = first * kLanes;
    const bool packed = pass.values == nullptr;
    const auto* values = reinterpret_cast<const Number*>(packed ? scratch.values : pass.values) +
                         (packed ? column * ceil_div(pass.keys, kNumbers) : column);
    const int64_t value_stride = packed ? kPanel : pass.value_stride;
    const float* accumulator = pass.accumulator == nullptr ? nullptr : pass.accumulator + column;
    float* out = pass.out + column;
    const int64_t chain = min_of(kChain, pass.seen);
    value_panel<Rows, width.value>(weights, values, value_stride, chain, accumulator, head_vectors * kLanes, alpha,
                                   chain < pass.seen ? ones : factor, out, pass.out_stride);
    if (chain == pass.seen) return;
    value_panel<Rows, width.value>(weights + chain / kNumbers, values + chain / kNumbers * value_stride, value_stride,
                                   pass.seen - chain, out, pass.out_stride, ones, factor, out, pass.out_stride);
  });
}

template <typename Number>
void attend_rows(int64_t rows, const Scratch& scratch, const Pass& pass, int64_t head_dim, RowsAhead& ahead) {
  static_assert(kTileRows == 6);
  switch (rows) {
    case 1:
      return attend_rows<Number, 1>(scratch, pass, head_dim, ahead);
    case 2:
      return attend_rows<Number, 2>(scratch, pass, head_dim, ahead);
    case 3:
      return attend_rows<Number, 3>(scratch, pass, head_dim, ahead);
    case 4:
      return attend_rows<Number, 4>(scratch, pass, head_dim, ahead);
    case 5:
      return attend_rows<Number, 5>(scratch, pass, head_dim, ahead);
    default:
      return attend_rows<Number, 6>(scratch, pass, head_dim, ahead);
  }
}

// One thread at work. Number: what is multiplied, float, or uint32_t for words of pairs of bfloat16.
template <typename T, typename Number>
struct Worker {
  const FlashAttentionArgs& args;
  const Plan& plan;
  const Scratch scratch;
  bool* fits;  // false where values are so small that products of words with them would be zeros

  // Of the keys that go into panels. The last of all is left out where its vector would hold nothing else: with 257
  // keys that is 2% faster. (The last of a causal block is not: how a key is multiplied must not depend on the cut.)
  int64_t panel_vectors(int64_t first, int64_t count) const {
    const bool has_lone_key = kIsFloat<Number> && first + count == args.key_length && count % kLanes == 1;
    return has_lone_key ? count / kLanes : ceil_div(count, kLanes);
  }

#if defined(GAFEXT_HAS_PAIRS)

  void pack_words(const T* key, const T* value, int64_t count, int64_t vectors) const {
    auto *keys = reinterpret_cast<uint32_t*>(scratch.keys), *values = reinterpret_cast<uint32_t*>(scratch.values);
    const int64_t key_stride = args.key_stride.row, value_stride = args.value_stride.row;
    for_each_panel(vectors, [&](int64_t first, auto width) {
      constexpr int64_t kPanel = width.value * kLanes;
      for (int64_t c = 0; c < kPanel; c += kLanes) {
        const int64_t j = first * kLanes + c;
        transpose_words(keys + first * kLanes * ceil_div(args.head_dim, 2) + c, kPanel, key + j * key_stride,
                        key_stride, min_of(kLanes, count - j), args.head_dim);
      }
    });
    BitVec largest{};
    for_each_panel(plan.head_floats / kLanes, [&](int64_t first, auto width) {
      constexpr int64_t kPanel = width.value * kLanes;
      uint32_t* to = values + first * kLanes * ceil_div(count, 2);
      for (int64_t j = 0; j < count; j += 2, to += kPanel) {
        for (int64_t c = 0; c < kPanel; c += kLanes) {
          const int64_t column = first * kLanes + c;
          const T* low = value + j * value_stride + column;
          const BitVec words = zip_rows(low, j + 1 < count ? low + value_stride : nullptr, args.head_dim - column);
          __builtin_memcpy(to + c, &words, sizeof(words));
          largest = largest_pair(largest, words);
        }
      }
    });
    if (!products_are_normal(largest)) __atomic_store_n(fits, false, __ATOMIC_RELAXED);
  }

#endif

  void pack_tile(const T* key, const T* value, int64_t count, int64_t vectors) const {
#if defined(GAFEXT_HAS_PAIRS)
    if constexpr (!kIsFloat<Number>) return pack_words(key, value, count, vectors);
#endif
    for_each_panel(vectors, [&](int64_t first, auto width) {
      constexpr int64_t kPanel = width.value * kLanes;
      for (int64_t c = 0; c < kPanel; c += kLanes) {
        const int64_t j = first * kLanes + c;
        transpose_rows(scratch.keys + first * kLanes * args.head_dim + c, kPanel, key + j * args.key_stride.row,
                       args.key_stride.row, min_of(kLanes, count - j), args.head_dim);
      }
    });
    if (const int64_t j = vectors * kLanes; j < count) {
      copy_row(scratch.keys + j * args.head_dim, key + j * args.key_stride.row, args.head_dim);
    }
    if (plan.values_in_place) return;
    for_each_panel(plan.head_floats / kLanes, [&](int64_t first, auto width) {
      constexpr int64_t kPanel = width.value * kLanes;
      const int64_t column = first * kLanes, columns = min_of(kPanel, args.head_dim - column);
      for (int64_t j = 0; j < count; ++j) {
        copy_row(scratch.values + column * count + j * kPanel, value + j * args.value_stride.row + column, columns);
      }
    });
  }

  // Rows [row, row + rows) of a block against the packed tile of `count` keys that begins at key `first`.
  void attend_group(const Block<T>& block, int64_t row, int64_t rows, int64_t first, int64_t count,
                    RowsAhead& ahead) const {
    const int64_t group = row / kTileRows;
    const int64_t keys = args.is_causal ? min_of(args.key_length, block.begin + row + rows) : args.key_length;
    if (first > 0 && first >= keys) return;

    for (int64_t r = 0; r < rows; ++r) {
      float* to = scratch.query + r * kQueryStride;
      const T* from = block.query + (row + r) * args.query_stride.row;
      if constexpr (kIsFloat<Number>) {
        copy_row(to, from, args.head_dim, args.scale * kLog2E);
      } else {
        if (args.head_dim % 2 != 0) to[args.head_dim / 2] = 0.0f;
        __builtin_memcpy(to, from, args.head_dim * sizeof(T));
      }
    }
    float* accumulator = scratch.accumulator + min_of(row, plan.accumulator_rows - kTileRows) * plan.head_floats;
    T* result = block.out + row * args.out_stride.row;

    Pass pass;
    pass.keys = count;
    pass.scale = args.scale * kLog2E;
    pass.vectors = panel_vectors(first, count);
    pass.values =
        plan.values_in_place ? reinterpret_cast<const float*>(block.value + first * args.value_stride.row) : nullptr;
    pass.value_stride = args.value_stride.row;
    pass.seen = min_of(count, keys - first);
    pass.diagonal = args.is_causal ? block.begin + row + 1 - first : count;
    pass.is_last = first + count >= keys;
    pass.max = scratch.max + group * kGroupLanes;
    pass.sum = scratch.sum + group * kGroupLanes;
    pass.accumulator = first == 0 ? nullptr : accumulator;
    const bool direct = pass.is_last && args.dtype == DType::kFloat32 && args.head_dim == plan.head_floats;
    pass.out = direct ? reinterpret_cast<float*>(result) : accumulator;
    pass.out_stride = direct ? args.out_stride.row : plan.head_floats;
    if (pass.is_last) {
      ahead.results = RowStream(result, args.out_stride.row, args.head_dim, rows);
      ahead.results.is_written = true;
    }

    attend_rows<Number>(rows, scratch, pass, args.head_dim, ahead);
    if (!pass.is_last || direct) return;
    for (int64_t r = 0; r < rows; ++r)
      copy_result(result + r * args.out_stride.row, accumulator + r * plan.head_floats);
  }

  void copy_result(T* to, const float* from) const {
    int64_t d = 0;
    for (; d + kLanes <= args.head_dim; d += kLanes) store(to + d, load(from + d));
    if (d < args.head_dim) store_first(to + d, load(from + d), args.head_dim - d);
  }

  // `next` is the unit that this thread does afterwards.
  void attend_block(int64_t unit, int64_t next) const {
    const Block<T> block(args, plan, unit), next_block(args, plan, next);
    for (int64_t i = 0; i < plan.groups * kGroupLanes; ++i) {
      scratch.max[i] = -kInfinity;
      scratch.sum[i] = 0.0f;
    }

    int64_t first = 0;
    do {
      const int64_t count = min_of(plan.keys, block.keys - first);
      pack_tile(block.key + first * args.key_stride.row, block.value + first * args.value_stride.row, count,
                panel_vectors(first, count));

      const int64_t after = first + plan.keys < block.keys ? first + plan.keys : 0;
      const Block<T>& from = after > 0 ? block : next_block;
      const int64_t next_count = min_of(plan.keys, from.keys - after);
      RowsAhead ahead;
      ahead.next_keys =
          RowStream(from.key + after * args.key_stride.row, args.key_stride.row, args.head_dim, next_count);
      ahead.next_values =
          RowStream(from.value + after * args.value_stride.row, args.value_stride.row, args.head_dim, next_count);

      for (int64_t row = 0; row < block.rows; row += kTileRows) {
        const int64_t next_row = row + kTileRows < block.rows ? row + kTileRows : 0;
        const Block<T>& next_from = next_row > 0 ? block : from;
        ahead.next_queries = RowStream(next_from.query + next_row * args.query_stride.row, args.query_stride.row,
                                       args.head_dim, min_of(kTileRows, next_from.rows - next_row));
        attend_group(block, row, min_of(kTileRows, block.rows - row), first, count, ahead);
      }
      first += plan.keys;
    } while (first < block.keys);
  }
};

}  // namespace

void flash_attention(const FlashAttentionArgs& args) {
  if (args.batch * args.heads * args.query_length * args.head_dim == 0) return;
#if defined(__AMX_BF16__)
  bool done = false;
  with_element_type(args.dtype, [&](auto element) {
    using Tiled = AmxAttention<decltype(element)>;
    if (Tiled::pays(args)) done = Tiled(args).run();
  });
  if (done) return;
#endif
  const Plan plan = make_plan(args);
  float* memory = scratch(max_threads() * plan.scratch_floats);
  bool fits = true;
  const auto attend = [&](auto element, auto number) {
    parallel_for_ahead(args.batch * args.heads * plan.row_blocks, [&](int64_t thread, int64_t unit, int64_t next) {
      const Scratch scratch(plan, memory + thread * plan.scratch_floats);
      Worker<decltype(element), decltype(number)>{args, plan, scratch, &fits}.attend_block(unit, next);
    });
  };
#if defined(GAFEXT_HAS_PAIRS)
  if (args.dtype == DType::kBFloat16 && multiplies_pairs()) {
    attend(BFloat16(), uint32_t());
    if (fits) return;
  }
#endif
  with_element_type(args.dtype, [&](auto element) { attend(element, float()); });
}

}  // namespace gafext::GAFEXT_ISA
