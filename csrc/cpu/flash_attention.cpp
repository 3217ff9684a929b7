// Attention by tiles, with an online softmax (FlashAttention, arXiv 2205.14135, algorithm 1).
//
// A unit of work is a block of query rows of one (batch, head). It walks over the keys in tiles:
//
//   pack      key tile transposed, value tile, both float32          K^T [D, keys], V [keys, D']
//   for each group of kTileRows query rows:
//     scores  S = Q K^T in registers, a panel of keys at a time      S [kTileRows, keys], in the L1 cache
//     softmax running maximum m, sum l; S becomes P = 2^(S - m)
//     values  O = alpha O + P V, a panel of columns at a time        O [rows, D']
//
// and divides by l at the end. D' is D in whole vectors; scale and log2(e) are folded into Q. What the inner loops
// touch (Q, O, K^T, V: 128 KiB each at most) stays in the L2 cache, whatever the lengths. Each row's arithmetic is the
// same however rows are dealt out, so the result does not depend on the number of threads.
#include "vector.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int64_t kTileFloats = 32768;  // of a key tile; 64..512 keys: fewer rescale too often, more leave the cache
constexpr int64_t kMinRows = 96;        // of a query block, below which packing the keys shows

// How a problem is cut. Lengths in vectors are of kLanes.
struct Plan {
  int64_t rows;         // of a query block, a multiple of kTileRows
  int64_t row_blocks;   // in query_length
  int64_t keys;         // of a key tile, a multiple of kLanes
  int64_t head_floats;  // head_dim in whole vectors
  int64_t scratch_floats;
};

Plan make_plan(const FlashAttentionArgs& args) {
  Plan plan;
  plan.head_floats = round_up(args.head_dim, kLanes);

  const int64_t max_keys = max_of(64, min_of(512, kTileFloats / plan.head_floats / kLanes * kLanes));
  const int64_t tiles = max_of(1, ceil_div(args.key_length, max_keys));
  plan.keys = round_up(max_of(1, ceil_div(args.key_length, tiles)), kLanes);

  int64_t max_rows = max_of(kMinRows, min_of(384, kTileFloats / plan.head_floats));
  const int64_t heads = args.batch * args.heads;
  while (max_rows >= 2 * kMinRows && heads * ceil_div(args.query_length, max_rows) < 4 * max_threads()) max_rows /= 2;
  plan.row_blocks = ceil_div(args.query_length, max_rows);
  plan.rows = round_up(ceil_div(args.query_length, plan.row_blocks), kTileRows);

  const int64_t rows = plan.rows, keys = plan.keys, head = plan.head_floats;
  plan.scratch_floats = 2 * rows * head + 2 * keys * head + kTileRows * keys + round_up(2 * rows, kLanes);
  return plan;
}

// One thread's memory. Every part begins at a whole vector.
struct Scratch {
  float *query, *out;  // [rows, head_floats]
  float* keys;         // panels of up to kTileVectors vectors of keys: [head_dim, panel]
  float* values;       // [keys, head_floats]
  float* scores;       // [kTileRows, keys]
  float *max, *sum;    // [rows]

  Scratch(const Plan& plan, float* memory) {
    query = memory;
    out = query + plan.rows * plan.head_floats;
    keys = out + plan.rows * plan.head_floats;
    values = keys + plan.keys * plan.head_floats;
    scores = values + plan.keys * plan.head_floats;
    max = scores + kTileRows * plan.keys;
    sum = max + plan.rows;
  }
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

// scores[r, :] = sum_d query[r, d] keys[d, :], for kTileRows rows and one panel of keys.
template <int Width>
void score_panel(const float* query, int64_t query_stride, const float* keys, int64_t head_dim, float* scores,
                 int64_t scores_stride) {
  Vec tile[kTileRows][Width] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec key[Width];
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) key[c] = load(keys + (d * Width + c) * kLanes);
    GAFEXT_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const Vec q = broadcast(query[r * query_stride + d]);
      GAFEXT_UNROLL
      for (int c = 0; c < Width; ++c) tile[r][c] += q * key[c];
    }
  }
  GAFEXT_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) store(scores + r * scores_stride + c * kLanes, tile[r][c]);
  }
}

// out[r, :] = alpha[r] out[r, :] + sum_j weights[r, j] values[j, :], for kTileRows rows and one panel of columns.
template <int Width>
void value_panel(const float* weights, int64_t weights_stride, const float* values, int64_t head_floats, int64_t keys,
                 const float* alpha, float* out) {
  Vec tile[kTileRows][Width];
  GAFEXT_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) tile[r][c] = load(out + r * head_floats + c * kLanes) * alpha[r];
  }
  for (int64_t j = 0; j < keys; ++j) {
    Vec value[Width];
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) value[c] = load(values + j * head_floats + c * kLanes);
    GAFEXT_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const Vec p = broadcast(weights[r * weights_stride + j]);
      GAFEXT_UNROLL
      for (int c = 0; c < Width; ++c) tile[r][c] += p * value[c];
    }
  }
  GAFEXT_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    GAFEXT_UNROLL
    for (int c = 0; c < Width; ++c) store(out + r * head_floats + c * kLanes, tile[r][c]);
  }
}

// One row's step of the online softmax over the first `visible` scores of `length` (whole vectors): scores become
// weights relative to the new maximum, max and sum move on. Returns alpha, what the row's past is worth now.
GAFEXT_INLINE float softmax_row(float* scores, int64_t visible, int64_t length, float* max, float* sum) {
  for (int64_t j = visible; j < length; ++j) scores[j] = -kInfinity;
  Vec highest = broadcast(*max);
  for (int64_t j = 0; j < length; j += kLanes) highest = max_of(load(scores + j), highest);
  const float new_max = max_in(highest);
  // All of them -inf: any finite reference makes every weight 0, where -inf - -inf would be NaN.
  const float reference = new_max == -kInfinity ? 0.0f : new_max;

  Vec total = {};
  for (int64_t j = 0; j < length; j += kLanes) {
    const Vec weight = exp2_of(load(scores + j) - reference);
    store(scores + j, weight);
    total += weight;
  }
  const float alpha = exp2_of(broadcast(*max - reference))[0];
  *max = new_max;
  *sum = alpha * *sum + sum_in(total);
  return alpha;
}

template <typename T>
void pack_tile(const T* key, const T* value, const FlashAttentionArgs& args, const Plan& plan, int64_t count,
               const Scratch& scratch) {
  for_each_panel(ceil_div(count, kLanes), [&](int64_t first, auto width) {
    constexpr int64_t panel = width.value * kLanes;
    float* to = scratch.keys + first * kLanes * args.head_dim;
    for (int64_t c = 0; c < width.value; ++c) {
      const int64_t j = (first + c) * kLanes;
      transpose_rows(to + c * kLanes, panel, key + j * args.key_stride.row, args.key_stride.row,
                     min_of(kLanes, count - j), args.head_dim);
    }
  });
  for (int64_t j = 0; j < count; ++j) {
    copy_row(scratch.values + j * plan.head_floats, value + j * args.value_stride.row, args.head_dim);
  }
}

// Rows [group, group + kTileRows) of the block against the packed tile of `count` keys. With a causal mask the group's
// first row sees `diagonal` of them, the next row one more.
void attend_group(const FlashAttentionArgs& args, const Plan& plan, int64_t group, int64_t count, int64_t diagonal,
                  const Scratch& scratch) {
  const int64_t seen = args.is_causal ? min_of(count, diagonal + kTileRows - 1) : count;  // by the last row
  if (seen <= 0) return;

  const float* query = scratch.query + group * plan.head_floats;
  for_each_panel(ceil_div(count, kLanes), [&](int64_t first, auto width) {
    if (first * kLanes >= seen) return;
    score_panel<width.value>(query, plan.head_floats, scratch.keys + first * kLanes * args.head_dim, args.head_dim,
                             scratch.scores + first * kLanes, plan.keys);
  });

  float alpha[kTileRows];
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t visible = args.is_causal ? max_of(0, min_of(seen, diagonal + r)) : seen;
    alpha[r] = softmax_row(scratch.scores + r * plan.keys, visible, round_up(seen, kLanes), scratch.max + group + r,
                           scratch.sum + group + r);
  }

  float* out = scratch.out + group * plan.head_floats;
  for_each_panel(plan.head_floats / kLanes, [&](int64_t first, auto width) {
    value_panel<width.value>(scratch.scores, plan.keys, scratch.values + first * kLanes, plan.head_floats, seen, alpha,
                             out + first * kLanes);
  });
}

// A block of query rows of one (batch, head) from packing to the division by the sum.
template <typename T>
void attend_block(const FlashAttentionArgs& args, const Plan& plan, int64_t unit, const Scratch& scratch) {
  const int64_t begin = unit % plan.row_blocks * plan.rows, rows = min_of(plan.rows, args.query_length - begin);
  const int64_t head = unit / plan.row_blocks % args.heads, batch = unit / plan.row_blocks / args.heads;
  const auto head_of = [&](const void* base, const HeadStrides& stride) {
    return static_cast<const T*>(base) + batch * stride.batch + head * stride.head;
  };
  const T* query = head_of(args.query, args.query_stride) + begin * args.query_stride.row;
  const T* key = head_of(args.key, args.key_stride);
  const T* value = head_of(args.value, args.value_stride);
  T* out = const_cast<T*>(head_of(args.out, args.out_stride)) + begin * args.out_stride.row;

  const int64_t groups_end = round_up(rows, kTileRows);
  for (int64_t i = 0; i < groups_end; ++i) {
    copy_row(scratch.query + i * plan.head_floats, query + min_of(i, rows - 1) * args.query_stride.row, args.head_dim,
             args.scale * kLog2E);
    scratch.max[i] = -kInfinity;
    scratch.sum[i] = 0.0f;
  }
  for (int64_t i = 0; i < groups_end * plan.head_floats; ++i) scratch.out[i] = 0.0f;

  const int64_t end = args.is_causal ? min_of(args.key_length, begin + rows) : args.key_length;
  for (int64_t first = 0; first < end; first += plan.keys) {
    const int64_t count = min_of(plan.keys, end - first);
    pack_tile(key + first * args.key_stride.row, value + first * args.value_stride.row, args, plan, count, scratch);
    for (int64_t group = 0; group < groups_end; group += kTileRows) {
      attend_group(args, plan, group, count, begin + group + 1 - first, scratch);
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    const float inverse = scratch.sum[i] == 0.0f ? 0.0f : 1.0f / scratch.sum[i];  // no key, or every score -inf: zeros
    const float* from = scratch.out + i * plan.head_floats;
    T* to = out + i * args.out_stride.row;
    int64_t d = 0;
    for (; d + kLanes <= args.head_dim; d += kLanes) store(to + d, load(from + d) * inverse);
    if (d < args.head_dim) store_first(to + d, load(from + d) * inverse, args.head_dim - d);
  }
}

}  // namespace

void flash_attention(const FlashAttentionArgs& args) {
  if (args.batch * args.heads * args.query_length * args.head_dim == 0) return;
  const Plan plan = make_plan(args);
  float* memory = scratch(max_threads() * plan.scratch_floats);
  with_element_type(args.dtype, [&](auto element) {
    parallel_for(args.batch * args.heads * plan.row_blocks, [&](int64_t thread, int64_t unit) {
      attend_block<decltype(element)>(args, plan, unit, Scratch(plan, memory + thread * plan.scratch_floats));
    });
  });
}

}  // namespace gafext::GAFEXT_ISA
