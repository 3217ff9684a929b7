// Attention by tiles, with an online softmax (FlashAttention, arXiv 2205.14135, algorithm 1).
//
// A unit of work is a block of query rows of one (batch, head). It walks over the keys in tiles:
//
//   pack      key tile transposed, value tile, both float32          K^T, V in panels of kTileVectors vectors
//   for each group of up to kTileRows query rows:
//     scores  S = Q K^T in registers, a panel of keys at a time      S [kTileRows, keys], in the L1 cache
//     softmax running maximum m, sum l; S becomes P = 2^(S - m)
//     values  O = alpha O + P V, a panel of columns at a time        O [rows, D], in the L2 cache
#include "vector.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int64_t kTileFloats = 32768;
constexpr int64_t kMaxTileKeys = 512;
constexpr int64_t kMaxRows = 512;
constexpr int64_t kMinRows = 96;

// Constants, so that all rows of a group are one pointer and immediate offsets; a vector more than a power of two, so
// that they fall into different sets of the cache.
constexpr int64_t kQueryStride = kMaxHeadDim + 16;
constexpr int64_t kScoreStride = kMaxTileKeys + 16;

// The softmax's numbers of a group of rows lie in one array, lane r for row r.
constexpr int kMaxRowsOfGroup = 8;  // kTileRows in a power of two
constexpr int64_t kGroupLanes = kLanes > kMaxRowsOfGroup ? kLanes : kMaxRowsOfGroup;

// How a problem is cut. Lengths in vectors are of kLanes.
struct Plan {
  int64_t rows;         // of a query block
  int64_t row_blocks;   // in query_length
  int64_t keys;         // of a key tile, a multiple of kLanes
  int64_t head_floats;  // head_dim in whole vectors
  int64_t scratch_floats;
};

Plan make_plan(const FlashAttentionArgs& args) {
  Plan plan;
  plan.head_floats = round_up(args.head_dim, kLanes);

  const int64_t max_keys = max_of(64, min_of(kMaxTileKeys, kTileFloats / plan.head_floats / kLanes * kLanes));
  const int64_t tiles = max_of(1, ceil_div(args.key_length, max_keys));
  plan.keys = round_up(max_of(1, ceil_div(args.key_length, tiles)), kLanes);

  const int64_t heads = args.batch * args.heads, max_rows = tiles == 1 ? args.query_length : kMaxRows;
  const int64_t fewest = ceil_div(args.query_length, max_rows), most = max_of(fewest, args.query_length / kMinRows);
  plan.row_blocks = max_of(fewest, min_of(most, ceil_div(4 * max_threads(), heads)));
  plan.rows = ceil_div(args.query_length, plan.row_blocks);
  plan.row_blocks = ceil_div(args.query_length, plan.rows);

  const int64_t groups = ceil_div(plan.rows, kTileRows);
  const int64_t past_rows = tiles == 1 ? kTileRows : plan.rows;
  plan.scratch_floats = kTileRows * (kQueryStride + kScoreStride) + 2 * groups * kGroupLanes +
                        (past_rows + 2 * plan.keys) * plan.head_floats;
  return plan;
}

// One thread's memory. Every part begins at a whole vector.
struct Scratch {
  float* query;        // [kTileRows, kQueryStride]
  float* scores;       // [kTileRows, kScoreStride]
  float *max, *sum;    // [groups, kGroupLanes]
  float* keys;         // panels of up to kTileVectors vectors of keys: [head_dim, panel]
  float* values;       // panels of up to kTileVectors vectors of columns: [keys, panel]
  float* past;         // [rows, head_floats]; of one group where a block has only one tile

  Scratch(const Plan& plan, float* memory) {
    const int64_t groups = ceil_div(plan.rows, kTileRows);
    query = memory;
    scores = query + kTileRows * kQueryStride;
    max = scores + kTileRows * kScoreStride;
    sum = max + groups * kGroupLanes;
    keys = sum + groups * kGroupLanes;
    values = keys + plan.keys * plan.head_floats;
    past = values + plan.keys * plan.head_floats;
  }
};

// Rows that are needed soon, brought into the L2 cache one at a time from inside the score loop: a burst would stall it.
struct RowStream {
  const char* row;
  int64_t stride, bytes, count;

  GAFEXT_INLINE void fetch_one() {
    for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(row + offset, 0, 2);
    row += stride;
    --count;
  }
};
struct RowsAhead {
  // The next group's queries, this group's results, the next tile's keys and values, and no end of nothing.
  RowStream waiting[5];
};

// Cuts `vectors` into panels of at most kTileVectors, as even as can be (5 is 3 + 2: a lone vector would leave the
// multipliers waiting), and calls body(first, PanelWidth<n>()) for each.
template <int Width>
struct PanelWidth {
  static constexpr int value = Width;
};
template <typename Body>
GAFEXT_INLINE void for_each_panel(int64_t vectors, const Body& body) {
  int64_t panels = ceil_div(vectors, kTileVectors);
  for (int64_t first = 0; first < vectors; --panels) {
    const int64_t width = min_of(kTileVectors, vectors - first);
    if (width == 1) body(first, PanelWidth<1>());
    if (width == 2) body(first, PanelWidth<2>());
    if constexpr (kTileVectors == 4) {
      if (width == 3) body(first, PanelWidth<3>());
      if (width == 4) body(first, PanelWidth<4>());
    }
    first += width;
  }
}

// tile[r][:] += left[r * Stride] * panel[:]
template <int64_t Stride, int Rows, int Width>
GAFEXT_INLINE void add_product(Vec (&tile)[Rows][Width], const float* left, const float* panel) {
  Vec right[Width];
  GAFEXT_UNROLL
  for (int c = 0; c < Width; ++c) right[c] = load(panel + c * kLanes);
  GAFEXT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const Vec factor = broadcast(left[r * Stride]);
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) tile[r][c] += factor * right[c];
  }
}

template <int... I>
GAFEXT_INLINE IntVec lane_numbers(Lanes<I...>) {
  return IntVec{I...};
}

// scores[r, :] = sum_d query[r, d] keys[d, :] for one panel of keys; `highest` goes up to the highest of each row, lane
// by lane. Row r sees the panel's first min(count, diagonal + r) keys: the others score -inf.
template <int Rows, int Width>
__attribute__((noinline)) void score_panel(const float* query, const float* keys, int64_t head_dim, int64_t count, int64_t diagonal, float* scores,
                 Vec* highest, RowsAhead& ahead) {
  constexpr int kStep = 4;  // of the head's numbers, for one row ahead
  Vec tile[Rows][Width] = {};
  RowStream* current = ahead.waiting;
  RowStream rows = *current;
  int64_t d = 0;
  for (; d + kStep <= head_dim; d += kStep) {
    while (rows.count == 0) {
      current->count = 0;
      rows = *++current;
    }
    rows.fetch_one();
    GAFEXT_UNROLL
    for (int i = 0; i < kStep; ++i) {
      add_product<kQueryStride>(tile, query + d + i, keys + (d + i) * Width * kLanes);
    }
  }
  for (; d < head_dim; ++d) add_product<kQueryStride>(tile, query + d, keys + d * Width * kLanes);
  *current = rows;

  if (min_of(count, diagonal) < Width * kLanes) {
    GAFEXT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const int visible = static_cast<int>(min_of(count, diagonal + r));
      GAFEXT_UNROLL
      for (int c = 0; c < Width; ++c) {
        tile[r][c] = lane_numbers(AllLanes()) < visible - c * kLanes ? tile[r][c] : broadcast(-kInfinity);
      }
    }
  }
  GAFEXT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    Vec row_highest = highest[r];
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) {
      store(scores + r * kScoreStride + c * kLanes, tile[r][c]);
      row_highest = max_of(tile[r][c], row_highest);
    }
    highest[r] = row_highest;
  }
}

// out[r, :] = factor[r] (alpha[r] past[r, :] + sum_j weights[r, j] values[j, :]) for one panel of columns. No past: 0.
template <int Rows, int Width>
__attribute__((noinline)) void value_panel(const float* weights, const float* values, int64_t keys, const float* past, int64_t past_stride,
                 const float* alpha, const float* factor, float* out, int64_t out_stride) {
  Vec tile[Rows][Width] = {};
  if (past != nullptr) {
    GAFEXT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      GAFEXT_UNROLL
      for (int c = 0; c < Width; ++c) tile[r][c] = load(past + r * past_stride + c * kLanes) * alpha[r];
    }
  }
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4) {
    GAFEXT_UNROLL
    for (int i = 0; i < 4; ++i) add_product<kScoreStride>(tile, weights + j + i, values + (j + i) * Width * kLanes);
  }
  for (; j < keys; ++j) add_product<kScoreStride>(tile, weights + j, values + j * Width * kLanes);
  GAFEXT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) store(out + r * out_stride + c * kLanes, tile[r][c] * factor[r]);
  }
}

// lanes[r] = the fold of all lanes of rows[r]. All rows at once: a shuffle works on two of them.
template <typename Fold>
GAFEXT_INLINE void fold_rows(Vec (&rows)[kMaxRowsOfGroup], float* lanes, Fold fold) {
  if constexpr (kLanes < kMaxRowsOfGroup) {
    for (int r = 0; r < kMaxRowsOfGroup; ++r) lanes[r] = reduce(rows[r], fold);
  } else {
    GAFEXT_UNROLL
    for (int half = kMaxRowsOfGroup / 2; half > 0; half /= 2) {
      GAFEXT_UNROLL
      for (int i = 0; i < half; ++i) {
        rows[i] = fold(zip_low(rows[i], rows[i + half], AllLanes()), zip_high(rows[i], rows[i + half], AllLanes()));
      }
    }
    if constexpr (kLanes > kMaxRowsOfGroup) rows[0] = fold(rows[0], rotate<kMaxRowsOfGroup>(rows[0], AllLanes()));
    store(lanes, rows[0]);
  }
}

// A group of query rows against a tile of keys.
struct Step {
  int64_t seen;      // keys of the tile that the group's last row sees
  int64_t diagonal;  // that its first row sees by the causal mask, each further row one more
  bool is_last;      // tile of the group
  float *max, *sum;  // [kGroupLanes], of the tiles before
  const float* past; // [rows, head_floats], of the tiles before, null at the first
  float* out;        // where past and this tile go
  int64_t out_stride;
};

// Scores become weights relative to the new maximum; max and sum move on. `alpha` gets what the past is worth now, and
// `factor` what normalises the result.
__attribute__((noinline)) void softmax_rows(float* scores, int rows, Vec (&highest)[kMaxRowsOfGroup], const Step& step, float* alpha,
                  float* factor) {
  alignas(64) float reference[kGroupLanes], total[kGroupLanes];
  fold_rows(highest, reference, [](Vec a, Vec b) { return max_of(a, b); });
  for (int64_t i = 0; i < kGroupLanes; i += kLanes) {
    const Vec old_max = load(step.max + i), new_max = max_of(load(reference + i), old_max);
    // All of them -inf: any finite reference makes every weight 0, where -inf - -inf would be NaN.
    const Vec finite = new_max == -kInfinity ? Vec{} : new_max;
    store(step.max + i, new_max);
    store(reference + i, finite);
    store(alpha + i, exp2_of(old_max - finite));
  }

  Vec sums[kMaxRowsOfGroup] = {};
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kScoreStride;
    const Vec zero = broadcast(reference[r]);
    Vec sum = {};
    for (int64_t j = 0; j < step.seen; j += kLanes) {
      const Vec weight = exp2_of(load(row + j) - zero);
      store(row + j, weight);
      sum += weight;
    }
    sums[r] = sum;
  }
  fold_rows(sums, total, [](Vec a, Vec b) { return a + b; });
  for (int64_t i = 0; i < kGroupLanes; i += kLanes) {
    const Vec sum = load(alpha + i) * load(step.sum + i) + load(total + i);
    store(step.sum + i, sum);
    // No key, or every score -inf: zeros.
    store(factor + i, !step.is_last ? broadcast(1.0f) : sum == 0.0f ? Vec{} : 1.0f / sum);
  }
}

template <int Rows>
void attend_group(const Scratch& scratch, const Step& step, int64_t count, int64_t head_dim, RowsAhead& ahead) {
  Vec highest[kMaxRowsOfGroup];
  for (Vec& row : highest) row = broadcast(-kInfinity);
  for_each_panel(ceil_div(count, kLanes), [&](int64_t first, auto width) {
    const int64_t key = first * kLanes;
    if (key >= step.seen) return;
    score_panel<Rows, width.value>(scratch.query, scratch.keys + key * head_dim, head_dim, count - key,
                                   step.diagonal - key, scratch.scores + key, highest, ahead);
  });

  alignas(64) float alpha[kGroupLanes], factor[kGroupLanes];
  softmax_rows(scratch.scores, Rows, highest, step, alpha, factor);

  const int64_t head_vectors = ceil_div(head_dim, kLanes);
  for_each_panel(head_vectors, [&](int64_t first, auto width) {
    const int64_t column = first * kLanes;
    value_panel<Rows, width.value>(scratch.scores, scratch.values + column * count, step.seen,
                                   step.past ? step.past + column : nullptr, head_vectors * kLanes, alpha, factor,
                                   step.out + column, step.out_stride);
  });
}

// The keys and values of one tile, where they lie.
template <typename T>
struct Tile {
  const T *key, *value;
  int64_t count;
};

template <typename T>
__attribute__((noinline)) void pack_tile(const Tile<T>& tile, const FlashAttentionArgs& args, const Scratch& scratch) {
  for_each_panel(ceil_div(tile.count, kLanes), [&](int64_t first, auto width) {
    constexpr int64_t panel = width.value * kLanes;
    for (int64_t c = 0; c < panel; c += kLanes) {
      const int64_t j = first * kLanes + c;
      transpose_rows(scratch.keys + first * kLanes * args.head_dim + c, panel, tile.key + j * args.key_stride.row,
                     args.key_stride.row, min_of(kLanes, tile.count - j), args.head_dim);
    }
  });
  for_each_panel(ceil_div(args.head_dim, kLanes), [&](int64_t first, auto width) {
    constexpr int64_t panel = width.value * kLanes;
    const int64_t columns = min_of(panel, args.head_dim - first * kLanes);
    for (int64_t j = 0; j < tile.count; ++j) {
      copy_row(scratch.values + first * kLanes * tile.count + j * panel,
               tile.value + j * args.value_stride.row + first * kLanes, columns);
    }
  });
}

// A block of query rows of one (batch, head), and where its tensors begin.
template <typename T>
struct Block {
  const T *query, *key, *value;
  T* out;
  int64_t begin, rows;
  int64_t keys;  // that any row of the block sees

  Block(const FlashAttentionArgs& args, const Plan& plan, int64_t unit) {
    const int64_t head = unit / plan.row_blocks % args.heads, batch = unit / plan.row_blocks / args.heads;
    const auto head_of = [&](const void* base, const HeadStrides& stride) {
      return static_cast<const T*>(base) + batch * stride.batch + head * stride.head;
    };
    begin = unit % plan.row_blocks * plan.rows;
    rows = min_of(plan.rows, args.query_length - begin);
    keys = args.is_causal ? min_of(args.key_length, begin + rows) : args.key_length;
    query = head_of(args.query, args.query_stride) + begin * args.query_stride.row;
    key = head_of(args.key, args.key_stride);
    value = head_of(args.value, args.value_stride);
    out = const_cast<T*>(head_of(args.out, args.out_stride)) + begin * args.out_stride.row;
  }

  Tile<T> tile(const FlashAttentionArgs& args, const Plan& plan, int64_t first) const {
    return {key + first * args.key_stride.row, value + first * args.value_stride.row, min_of(plan.keys, keys - first)};
  }
};

template <typename T>
void attend_block(const FlashAttentionArgs& args, const Plan& plan, int64_t unit, int64_t next_unit, const Scratch& scratch) {
  const Block<T> block(args, plan, unit);
  const int64_t groups = ceil_div(block.rows, kTileRows);
  for (int64_t i = 0; i < groups * kGroupLanes; ++i) {
    scratch.max[i] = -kInfinity;
    scratch.sum[i] = 0.0f;
  }

  int64_t first = 0;
  do {
    const Tile<T> tile = block.tile(args, plan, first);
    pack_tile(tile, args, scratch);
    const int64_t nothing = int64_t{1} << 62;
    RowsAhead ahead = {{{}, {}, {}, {}, {nullptr, 0, 0, nothing}}};
    const bool more = first + plan.keys < block.keys;
    if (more || next_unit >= 0) {
      const Tile<T> next = more ? block.tile(args, plan, first + plan.keys) : Block<T>(args, plan, next_unit).tile(args, plan, 0);
      const int64_t size = sizeof(T);
      ahead.waiting[2] = {reinterpret_cast<const char*>(next.key), args.key_stride.row * size, args.head_dim * size, next.count};
      ahead.waiting[3] = {reinterpret_cast<const char*>(next.value), args.value_stride.row * size, args.head_dim * size, next.count};
    }

    int64_t row = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t rows = ceil_div(block.rows - row, groups - group);
      const int64_t group_keys = args.is_causal ? min_of(args.key_length, block.begin + row + rows) : args.key_length;
      if (first == 0 || first < group_keys) {
        Step step;
        step.seen = min_of(tile.count, group_keys - first);
        step.diagonal = args.is_causal ? block.begin + row + 1 - first : tile.count;
        step.is_last = first + tile.count >= group_keys;
        step.max = scratch.max + group * kGroupLanes;
        step.sum = scratch.sum + group * kGroupLanes;
        float* past = scratch.past + (plan.keys < args.key_length ? row * plan.head_floats : 0);
        step.past = first == 0 ? nullptr : past;
        step.out = past;
        step.out_stride = plan.head_floats;
        T* out = block.out + row * args.out_stride.row;
        bool direct = false;
        if constexpr (sizeof(T) == sizeof(float)) {
          if (step.is_last && args.head_dim % kLanes == 0) {
            direct = true;
            step.out = out;
            step.out_stride = args.out_stride.row;
          }
        }
        for (int64_t r = 0; r < rows; ++r) {
          copy_row(scratch.query + r * kQueryStride, block.query + (row + r) * args.query_stride.row, args.head_dim, args.scale * kLog2E);
        }
        const int64_t next_row = row + rows;
        if (group + 1 < groups) {
          ahead.waiting[0] = {reinterpret_cast<const char*>(block.query + next_row * args.query_stride.row), args.query_stride.row * (int64_t)sizeof(T), args.head_dim * (int64_t)sizeof(T), ceil_div(block.rows - next_row, groups - group - 1)};
        } else if (more || next_unit >= 0) {
          ahead.waiting[0] = {reinterpret_cast<const char*>(more ? block.query : Block<T>(args, plan, next_unit).query), args.query_stride.row * (int64_t)sizeof(T), args.head_dim * (int64_t)sizeof(T), min_of(6, block.rows)};
        }
        if (step.is_last) ahead.waiting[1] = {reinterpret_cast<const char*>(out), args.out_stride.row * (int64_t)sizeof(T), args.head_dim * (int64_t)sizeof(T), rows};
        switch (rows) {
          case 1: attend_group<1>(scratch, step, tile.count, args.head_dim, ahead); break;
          case 2: attend_group<2>(scratch, step, tile.count, args.head_dim, ahead); break;
          case 3: attend_group<3>(scratch, step, tile.count, args.head_dim, ahead); break;
          case 4: attend_group<4>(scratch, step, tile.count, args.head_dim, ahead); break;
          case 5: attend_group<5>(scratch, step, tile.count, args.head_dim, ahead); break;
          case 6: attend_group<6>(scratch, step, tile.count, args.head_dim, ahead); break;
        }
        if (step.is_last && !direct) {
          for (int64_t r = 0; r < rows; ++r) {
            const float* from = past + r * plan.head_floats;
            T* to = out + r * args.out_stride.row;
            int64_t d = 0;
            for (; d + kLanes <= args.head_dim; d += kLanes) store(to + d, load(from + d));
            if (d < args.head_dim) store_first(to + d, load(from + d), args.head_dim - d);
          }
        }
      }
      row += rows;
    }
    first += plan.keys;
  } while (first < block.keys);
}

}  // namespace

void flash_attention(const FlashAttentionArgs& args) {
  if (args.batch * args.heads * args.query_length * args.head_dim == 0) return;
  const Plan plan = make_plan(args);
  float* memory = scratch(max_threads() * plan.scratch_floats);
  const int64_t units = args.batch * args.heads * plan.row_blocks;
  with_element_type(args.dtype, [&](auto element) {
    int64_t claimed = 0;
#pragma omp parallel num_threads(min_of(units, max_threads())) if (units > 1)
    {
      const Scratch scratch(plan, memory + omp_get_thread_num() * plan.scratch_floats);
      int64_t unit = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED);
      while (unit < units) {
        const int64_t next = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED);
        attend_block<decltype(element)>(args, plan, unit, next < units ? next : -1, scratch);
        unit = next;
      }
    }
  });
}

}  // namespace gafext::GAFEXT_ISA
