// The blocks and register tiles of flash_attention.cpp: the scores, the values, the fold of a group's rows, the scores
// of one key.
//
// A panel is up to kTileVectors vectors of a matrix's columns. A tile is a group of query rows by a panel, and stays in
// registers while a loop runs over what is summed.
#pragma once

#include "../ops/flash_attention.h"
#include "gemm.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kMaxTileKeys = 512;

// Constants, so that a group's rows are one pointer and immediate offsets; a vector more than a power of two, so that
// they fall into different sets of the L1 cache.
constexpr int64_t kQueryStride = kMaxWideHeadDim + 16;
constexpr int64_t kScoreStride = kMaxTileKeys + 16;

// What the softmax has per row of a group is one array, row r in lane r.
constexpr int kMaxGroupRows = 8;  // kTileRows as a power of two
constexpr int64_t kGroupLanes = kLanes > kMaxGroupRows ? kLanes : kMaxGroupRows;

// A block of query rows of one (batch, head), as a Plan with `rows` per block and `row_blocks` per head cuts it.
template <typename T>
struct Block {
  const T *query, *key, *value;
  T* out;
  int64_t begin, rows;
  int64_t keys;  // that its last row sees

  template <typename Plan>
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
};

// Rows of a tensor that are needed soon. They are brought into the L2 cache one at a time from inside the score loop,
// which a burst would stall.
struct RowStream {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0, count = 0;
  bool is_written = false;

  RowStream() = default;
  template <typename T>
  RowStream(const T* first, int64_t row_stride, int64_t columns, int64_t rows)
      : row(reinterpret_cast<const char*>(first)),
        stride(row_stride * static_cast<int64_t>(sizeof(T))),
        bytes(columns * static_cast<int64_t>(sizeof(T))),
        count(rows) {}

  GAFEXT_INLINE void fetch_one() {
    for (int64_t offset = 0; offset < bytes; offset += 64) {
      is_written ? prefetch_to_write(row + offset) : __builtin_prefetch(row + offset, 0, 2);
    }
    row += stride;
    --count;
  }
};

// In the order of need. An endless stream of empty rows follows, so that the score loop needs no check for the end.
struct RowsAhead {
  RowStream next_queries, results, next_keys, next_values, nothing;

  RowsAhead() { nothing.count = INT64_MAX; }
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
    const int64_t width = ceil_div(vectors - first, panels);
    if (width == 1) body(first, PanelWidth<1>());
    if (width == 2) body(first, PanelWidth<2>());
    if constexpr (kTileVectors == 4) {
      if (width == 3) body(first, PanelWidth<3>());
      if (width == 4) body(first, PanelWidth<4>());
    }
    first += width;
  }
}

// tile[r, :] += left[r * Stride] * panel[:]
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

#if defined(GAFEXT_HAS_PAIRS)

// The same of words of two numbers; `kept` clears what does not count of the panel's.
template <int64_t Stride, int Rows, int Width>
GAFEXT_INLINE void add_product(Vec (&tile)[Rows][Width], const uint32_t* left, const uint32_t* panel,
                               uint32_t kept = ~uint32_t{}) {
  BitVec right[Width];
  GAFEXT_UNROLL
  for (int c = 0; c < Width; ++c) right[c] = load_bits<BitVec>(panel + c * kLanes) & kept;
  GAFEXT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const BitVec words = bit_cast<BitVec>(broadcast_word(left + r * Stride));
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) add_pairs(tile[r][c], words, right[c]);
  }
}

#endif

// Row r keeps the panel's first min(count, diagonal + r) scores, the others become -inf.
template <int Rows, int Width>
GAFEXT_INLINE void mask_scores(Vec (&tile)[Rows][Width], int64_t count, int64_t diagonal) {
  GAFEXT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const int visible = static_cast<int>(min_of(count, diagonal + r));
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) {
      tile[r][c] = lane_numbers(AllLanes()) < visible - c * kLanes ? tile[r][c] : broadcast(-kInfinity);
    }
  }
}

// scores[r, :] = scale sum_d query[r, d] keys[d, :] for one panel of keys, masked; highest[r] keeps the highest of a row
// so far, lane by lane. Of words of pairs `depth` is their number; of float32 the scale is in the query.
template <int Rows, int Width, typename Number>
void score_panel(const Number* query, const Number* keys, int64_t depth, float scale, int64_t count, int64_t diagonal,
                 float* scores, Vec* highest, RowsAhead& ahead) {
  constexpr int kUnroll = 4;  // multiply-adds of a row for each row ahead; 2 stall it
  constexpr int kPanel = Width * kLanes;
  RowStream* waiting = &ahead.next_queries;
  RowStream stream = *waiting;

  Vec tile[Rows][Width] = {};
  int64_t d = 0;
  for (; d + kUnroll <= depth; d += kUnroll) {
    while (stream.count == 0) {
      waiting->count = 0;
      stream = *++waiting;
    }
    stream.fetch_one();
    GAFEXT_UNROLL
    for (int i = 0; i < kUnroll; ++i) add_product<kQueryStride>(tile, query + d + i, keys + (d + i) * kPanel);
  }
  for (; d < depth; ++d) add_product<kQueryStride>(tile, query + d, keys + d * kPanel);
  *waiting = stream;
  if constexpr (!kIsFloat<Number>) {
    GAFEXT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      GAFEXT_UNROLL
      for (int c = 0; c < Width; ++c) tile[r][c] *= scale;
    }
  }

  if (min_of(count, diagonal) < kPanel) mask_scores(tile, count, diagonal);
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

// out[r, :] = factor[r] (sum_j weights[r, j] values[j, :] + alpha[r] accumulator[r, :]) for one panel of columns; a
// null accumulator counts as zero. Words hold two keys each.
template <int Rows, int Width, typename Number>
void value_panel(const Number* weights, const Number* values, int64_t value_stride, int64_t keys,
                 const float* accumulator, int64_t accumulator_stride, const float* alpha, const float* factor,
                 float* out, int64_t out_stride) {
  constexpr int kUnroll = 4;
  Vec tile[Rows][Width] = {};
  int64_t j = 0;
  const int64_t whole = kIsFloat<Number> ? keys : keys / 2;
  for (; j + kUnroll <= whole; j += kUnroll) {
    GAFEXT_UNROLL
    for (int i = 0; i < kUnroll; ++i) add_product<kScoreStride>(tile, weights + j + i, values + (j + i) * value_stride);
  }
  for (; j < whole; ++j) add_product<kScoreStride>(tile, weights + j, values + j * value_stride);
  if constexpr (!kIsFloat<Number>) {  // a key that no row sees may be infinite
    if (keys % 2 != 0) add_product<kScoreStride>(tile, weights + j, values + j * value_stride, 0xffff);
  }
  if (accumulator != nullptr) {
    GAFEXT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      GAFEXT_UNROLL
      for (int c = 0; c < Width; ++c) tile[r][c] += load(accumulator + r * accumulator_stride + c * kLanes) * alpha[r];
    }
  }
  GAFEXT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) store(out + r * out_stride + c * kLanes, tile[r][c] * factor[r]);
  }
}

// lanes[r] = the fold of all lanes of rows[r], all rows at once: a shuffle serves two of them.
template <typename Fold>
GAFEXT_INLINE void fold_rows(Vec (&rows)[kMaxGroupRows], float* lanes, Fold fold) {
  if constexpr (kLanes < kMaxGroupRows) {
    for (int r = 0; r < kMaxGroupRows; ++r) lanes[r] = reduce(rows[r], fold);
  } else {
    GAFEXT_UNROLL
    for (int half = kMaxGroupRows / 2; half > 0; half /= 2) {
      GAFEXT_UNROLL
      for (int i = 0; i < half; ++i) {
        rows[i] = fold(zip_low(rows[i], rows[i + half], AllLanes()), zip_high(rows[i], rows[i + half], AllLanes()));
      }
    }
    if constexpr (kLanes > kMaxGroupRows) rows[0] = fold(rows[0], rotate<kMaxGroupRows>(rows[0], AllLanes()));
    store(lanes, rows[0]);
  }
}

// The same as score_panel for a single key: [head_dim] as the queries, zeros up to the next whole vector. The other
// lanes of its vector of scores are masked.
template <int Rows>
GAFEXT_INLINE void score_key(const float* query, const float* key, int64_t head_dim, int64_t diagonal, float* scores,
                             Vec* highest) {
  Vec products[kMaxGroupRows] = {};
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const Vec right = load(key + d);
    GAFEXT_UNROLL
    for (int r = 0; r < Rows; ++r) products[r] += load(query + r * kQueryStride + d) * right;
  }
  alignas(64) float sums[kGroupLanes];
  fold_rows(products, sums, [](Vec a, Vec b) { return a + b; });

  Vec tile[Rows][1];
  GAFEXT_UNROLL
  for (int r = 0; r < Rows; ++r) tile[r][0] = broadcast(sums[r]);
  mask_scores(tile, 1, diagonal);
  GAFEXT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    store(scores + r * kScoreStride, tile[r][0]);
    highest[r] = max_of(tile[r][0], highest[r]);
  }
}

}  // namespace
}  // namespace gafext::GAFEXT_ISA
