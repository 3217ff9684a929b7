// The tiles of cross_view_attention.cpp and of its gradient: the rows of one (position, head), scores, weights, sums.
#pragma once

#include "../ops/cross_view_attention.h"
#include "vector.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int kQuad = 4;                      // keys of a score tile
constexpr int kTileQueries = kLanes / kQuad;  // queries of a score tile: every lane is one score
constexpr float kLowest = -__FLT_MAX__;
constexpr int64_t kMinRunBytes = 64 * 1024;  // of one tensor: less is not worth waking a thread for

// The rows of one (position, head): row i is view i. Found once and kept in memory: from strides, GCC computed every
// pointer again and kept some in vector registers, 66 moves on the ports of the arithmetic.
template <typename T, int kViews>
struct Rows {
  const T *query[kViews], *key[kViews], *value[kViews];
  T* out[kViews];
};

// Counts through the (batch, position, head), heads fastest.
struct Place {
  int64_t batch, position, head;

  template <typename Args>
  Place(const Args& args, int64_t index)
      : batch(index / args.heads / args.length), position(index / args.heads % args.length), head(index % args.heads) {}

  template <typename Args>
  void advance(const Args& args) {
    if (++head < args.heads) return;
    head = 0;
    if (++position < args.length) return;
    position = 0;
    ++batch;
  }
};

template <typename T>
GAFEXT_INLINE void find_views(T** rows, T* base, const HeadStrides& stride, const Place& at, int64_t views) {
  T* first = base + at.batch * views * stride.batch + at.position * stride.row + at.head * stride.head;
  for (int64_t i = 0; i < views; ++i) rows[i] = first + i * stride.batch;
}

// Every lane becomes the fold over the kQuad lanes that it is one of.
template <typename Fold, int... I>
GAFEXT_INLINE Vec fold_quads(Vec v, Fold fold, Lanes<I...>) {
  v = fold(v, GAFEXT_SHUFFLE(v, v, (I ^ 1)));
  return fold(v, GAFEXT_SHUFFLE(v, v, (I ^ 2)));
}

// Lane i * kQuad + j is <query[first_query + i], key[first_key + j]>. Beyond the last view, that one counts again.
template <typename T, int kViews>
GAFEXT_INLINE Vec score_tile(const Rows<T, kViews>& rows, int64_t views, int64_t head_dim, int64_t first_query,
                             int64_t first_key) {
  const T *query[kTileQueries], *key[kQuad];
  GAFEXT_UNROLL
  for (int i = 0; i < kTileQueries; ++i) query[i] = rows.query[min_of(first_query + i, views - 1)];
  GAFEXT_UNROLL
  for (int j = 0; j < kQuad; ++j) key[j] = rows.key[min_of(first_key + j, views - 1)];

  Vec products[kLanes] = {};
  const auto multiply = [&](int64_t d, IntVec counted) __attribute__((always_inline)) {
    const auto load_counted = [&](const T* from) { return bit_cast<Vec>(bit_cast<IntVec>(load(from)) & counted); };
    Vec keys[kQuad];
    GAFEXT_UNROLL
    for (int j = 0; j < kQuad; ++j) keys[j] = load_counted(key[j] + d);
    GAFEXT_UNROLL
    for (int i = 0; i < kTileQueries; ++i) {
      const Vec queries = load_counted(query[i] + d);
      GAFEXT_UNROLL
      for (int j = 0; j < kQuad; ++j) products[i * kQuad + j] += queries * keys[j];
    }
  };
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) multiply(d, ~IntVec{});
  if (d < head_dim) multiply(head_dim - kLanes, lane_numbers(AllLanes()) >= int32_t(d - (head_dim - kLanes)));
  return sums_of(products);
}

// weights[quad][i][j] = softmax over all keys of the scores of query first_query + i with key quad * kQuad + j.
template <typename T, int kViews>
GAFEXT_INLINE void weigh(const Rows<T, kViews>& rows, int64_t views, int64_t head_dim, int64_t first_query, float scale,
                         float* weights) {
  const int64_t quads = ceil_div(views, kQuad);
  const IntVec key_in_quad = lane_numbers(AllLanes()) & (kQuad - 1);
  const float factor = scale * kLog2E;
  Vec scores[kMaxViews / kQuad], highest = broadcast(kLowest), sum = {};  // every score -inf: weights of 0, not NaN
  for (int64_t quad = 0; quad < quads; ++quad) {
    const int64_t first_key = quad * kQuad;
    Vec score = score_tile(rows, views, head_dim, first_query, first_key) * factor;
    if (first_key + kQuad > views) score = key_in_quad < int32_t(views - first_key) ? score : broadcast(-kInfinity);
    scores[quad] = score;
    highest = max_of(score, highest);
  }
  highest = fold_quads(highest, [](Vec a, Vec b) { return max_of(a, b); }, AllLanes());
  for (int64_t quad = 0; quad < quads; ++quad) {
    scores[quad] = exp2_of(scores[quad] - highest);
    sum += scores[quad];
  }
  sum = fold_quads(sum, [](Vec a, Vec b) { return a + b; }, AllLanes());
  const Vec inverse = sum == 0.0f ? Vec{} : 1.0f / sum;
  for (int64_t quad = 0; quad < quads; ++quad) store(weights + quad * kLanes, scores[quad] * inverse);
}

// out[first_query + i, d...] = sum_j weights[j / kQuad][i][j % kQuad] value[j, d...], `vectors` of them.
template <int vectors, typename T, int kViews>
GAFEXT_INLINE void combine(const Rows<T, kViews>& rows, int64_t views, int64_t first_query, const float* weights,
                           int64_t d) {
  Vec sums[kTileQueries][vectors] = {};
  for (int64_t j = 0; j < views; ++j) {
    const T* value = rows.value[j] + d;
    const float* weight = weights + j / kQuad * kLanes + j % kQuad;
    Vec values[vectors];
    GAFEXT_UNROLL
    for (int c = 0; c < vectors; ++c) values[c] = load(value + c * kLanes);
    GAFEXT_UNROLL
    for (int i = 0; i < kTileQueries; ++i) {
      GAFEXT_UNROLL
      for (int c = 0; c < vectors; ++c) sums[i][c] += weight[i * kQuad] * values[c];
    }
  }
  GAFEXT_UNROLL
  for (int i = 0; i < kTileQueries; ++i) {
    if (first_query + i >= views) break;
    T* out = rows.out[first_query + i] + d;
    GAFEXT_UNROLL
    for (int c = 0; c < vectors; ++c) store(out + c * kLanes, sums[i][c]);
  }
}

template <typename T, int kViews>
GAFEXT_INLINE void combine_columns(const Rows<T, kViews>& rows, int64_t views, int64_t head_dim, int64_t first_query,
                                   const float* weights) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) combine<4>(rows, views, first_query, weights, d);
  if (d + 2 * kLanes <= head_dim) combine<2>(rows, views, first_query, weights, d), d += 2 * kLanes;
  if (d + kLanes <= head_dim) combine<1>(rows, views, first_query, weights, d), d += kLanes;
  if (d < head_dim) combine<1>(rows, views, first_query, weights, head_dim - kLanes);
}

// body(begin, end) for one contiguous run of the (batch, position, head) of a thread.
template <typename T, typename Args, typename Body>
void parallel_units(const Args& args, const Body& body) {
  const int64_t units = args.batch * args.heads * args.length;
  const int64_t bytes = units * args.views * args.head_dim * int64_t(sizeof(T));
  const int64_t runs = min_of(units, min_of(max_threads(), ceil_div(bytes, kMinRunBytes)));
  parallel_runs(runs, [&](int64_t run) { body(units * run / runs, units * (run + 1) / runs); });
}

}  // namespace
}  // namespace gafext::GAFEXT_ISA
