// Attention over the views of one portrait, at each spatial position by itself: V rows of each tensor, read in place.
//
// A (position, head) moves 4 V D elements and takes 4 V^2 D operations: in float32 V/4 operations a byte, where a core
// could do about 10. So the work is memory traffic, and memory sets the plan:
//
//   thread   one contiguous run of the (batch, position, head), heads fastest: in (batch, length, heads, head_dim)
//            memory V ascending streams of each tensor, touched once and never copied
//   ahead    4 V rows a (position, head), by software: 16 streams and more are beyond the hardware's prefetchers
//
// The views lie a multiple of 4 KB apart, and so may the tensors: all 4 V rows then fall on the same sets of the L1
// cache, 16 lines for V = 4 where 12 fit. So the values and `out` are prefetched once the scores have read the queries
// and keys that they push out, and with them the queries and keys of the next (position, head). The values are combined
// one group of queries later, after the next scores, whose multiply-adds also fill the wait for a softmax. All of it
// one (position, head) ahead took 4 to 20% longer in the caches; no prefetching at all, 15 to 30% longer with cold
// ones.
//
// The rest stays in registers and in 4 KB of weights. For kLanes / 4 queries at a time (with AVX-512 all of V = 4):
//
//   scores   tiles of kLanes / 4 queries by 4 keys: kLanes running products, then all their sums at once, so that lane
//            4 i + j is <q_i, k_j>. Missing queries and keys count a view again, and its scores are dropped or
//            -infinity
//   softmax  across the tiles lane by lane, then within each 4 lanes
//   values   out[i, :] = sum_j weights[i, j] v_j, 4 vectors of columns at a time
//
// Columns beyond the last whole vector are read by one more vector that ends with the row: the scores mask what it has
// in common with the one before, and the values write that twice.
//
// Measured on two cores of a Sapphire Rapids, float32, V = 4, heads of 64: 0.9 to 1.05 times the speed of a large copy
// of the same bytes in the caches (0.7 to 0.9 for 5 MB, where the call itself takes a tenth), 1.05 to 1.2 times cold.
// out = query + key + value in one sweep is only 1 to 7% faster: the arithmetic, a third to a half of the time when all
// is in L1, hides behind the memory. For V >= 6 it shows. Packing Q, K and V first took twice the time. Non-temporal
// stores make the kernel 1.2 times faster, but the kernel and a pass over its result 3 to 5% slower.
#include "../ops/cross_view_attention.h"

#include "vector.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int kQuad = 4;                      // keys of a score tile
constexpr int kTileQueries = kLanes / kQuad;  // queries of a score tile: every lane is one score
constexpr float kLowest = -__FLT_MAX__;
constexpr int64_t kLineBytes = 64;
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

  Place(const CrossViewAttentionArgs& args, int64_t index)
      : batch(index / args.heads / args.length), position(index / args.heads % args.length), head(index % args.heads) {}

  void advance(const CrossViewAttentionArgs& args) {
    if (++head < args.heads) return;
    head = 0;
    if (++position < args.length) return;
    position = 0;
    ++batch;
  }
};

// Counts through the groups of queries of one (position, head) after the other.
struct QueryGroup {
  int64_t unit = 0, first_query = 0;

  void advance(int64_t views) {
    first_query += kTileQueries;
    if (first_query < views) return;
    first_query = 0;
    ++unit;
  }
};

template <typename T>
GAFEXT_INLINE void find_views(T** rows, T* base, const HeadStrides& stride, const Place& at, int64_t views) {
  T* first = base + at.batch * views * stride.batch + at.position * stride.row + at.head * stride.head;
  for (int64_t i = 0; i < views; ++i) rows[i] = first + i * stride.batch;
}

template <typename T, int kViews>
GAFEXT_INLINE void find_rows(Rows<T, kViews>& rows, const CrossViewAttentionArgs& args, const Place& at,
                             int64_t views) {
  find_views(rows.query, static_cast<const T*>(args.query), args.query_stride, at, views);
  find_views(rows.key, static_cast<const T*>(args.key), args.key_stride, at, views);
  find_views(rows.value, static_cast<const T*>(args.value), args.value_stride, at, views);
  find_views(rows.out, static_cast<T*>(args.out), args.out_stride, at, views);
}

// What the views [first, end) are read for next: the scores of the next (position, head), the values of this one.
template <typename T, int kViews>
GAFEXT_INLINE void prefetch(const Rows<T, kViews>& here, const Rows<T, kViews>& next, int64_t first, int64_t end,
                            int64_t head_dim) {
  for (int64_t i = first; i < end; ++i) {
    for (int64_t d = 0; d < head_dim; d += kLineBytes / int64_t(sizeof(T))) {
      __builtin_prefetch(next.query[i] + d);
      __builtin_prefetch(next.key[i] + d);
      __builtin_prefetch(here.value[i] + d);
      prefetch_to_write(here.out[i] + d);
    }
  }
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

// Units [begin, end) of the (batch, position, head), head_dim >= kLanes. The sizes are known at compile time unless
// they are 0.
template <int kViews, int kHeadDim, typename T>
void attend_run(const CrossViewAttentionArgs& args, int64_t begin, int64_t end) {
  constexpr int kMost = kViews > 0 ? kViews : kMaxViews;
  const int64_t views = kViews > 0 ? kViews : args.views, head_dim = kHeadDim > 0 ? kHeadDim : args.head_dim;
  const int64_t groups = (end - begin) * ceil_div(views, kTileQueries);
  constexpr int kKept = 4;  // units: the one before, this one, the next; a power of 2
  Rows<T, kMost> rows[kKept];
  alignas(64) float weights[2][ceil_div(kMost, kQuad) * kLanes];
  Place place(args, begin);
  find_rows(rows[0], args, place, views);
  QueryGroup weighed, combined;
  for (int64_t group = 0; group <= groups; ++group) {
    if (group < groups) {
      const int64_t first_query = weighed.first_query;
      const Rows<T, kMost>& here = rows[weighed.unit % kKept];
      Rows<T, kMost>& next = rows[(weighed.unit + 1) % kKept];
      if (first_query == 0) {
        place.advance(args);
        find_rows(next, args, place, views);
      }
      weigh(here, views, head_dim, first_query, args.scale, weights[group % 2]);
      prefetch(here, next, first_query, min_of(first_query + kTileQueries, views), head_dim);
      weighed.advance(views);
    }
    if (group > 0) {
      combine_columns(rows[combined.unit % kKept], views, head_dim, combined.first_query, weights[(group - 1) % 2]);
      combined.advance(views);
    }
  }
}

// Heads narrower than a vector are padded with zeros. Their rows are so short that the hardware's prefetching will do.
template <typename T>
void attend_narrow_run(const CrossViewAttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t views = args.views, head_dim = args.head_dim;
  float query[kMaxViews * kLanes], key[kMaxViews * kLanes], value[kMaxViews * kLanes], out[kMaxViews * kLanes];
  alignas(64) float weights[kMaxViews / kQuad * kLanes];
  Rows<T, kMaxViews> rows;
  Rows<float, kMaxViews> padded;
  for (int64_t i = 0; i < views; ++i) {
    padded.query[i] = query + i * kLanes, padded.key[i] = key + i * kLanes, padded.value[i] = value + i * kLanes;
    padded.out[i] = out + i * kLanes;
  }
  Place place(args, begin);
  for (int64_t unit = begin; unit < end; ++unit) {
    find_rows(rows, args, place, views);
    place.advance(args);
    for (int64_t i = 0; i < views; ++i) {
      store(query + i * kLanes, load_first(rows.query[i], head_dim));
      store(key + i * kLanes, load_first(rows.key[i], head_dim));
      store(value + i * kLanes, load_first(rows.value[i], head_dim));
    }
    for (int64_t i = 0; i < views; i += kTileQueries) {
      weigh(padded, views, kLanes, i, args.scale, weights);
      combine<1>(padded, views, i, weights, 0);
    }
    for (int64_t i = 0; i < views; ++i) store_first(rows.out[i], load(out + i * kLanes), head_dim);
  }
}

template <typename T>
auto run_for(const CrossViewAttentionArgs& args) {
  if (args.head_dim < kLanes) return attend_narrow_run<T>;
  if (args.head_dim != 64) return args.views == 4 ? attend_run<4, 0, T> : attend_run<0, 0, T>;
  switch (args.views) {
    case 4:
      return attend_run<4, 64, T>;
    case 6:
      return attend_run<6, 64, T>;
    case 8:
      return attend_run<8, 64, T>;
    case 16:
      return attend_run<16, 64, T>;
    default:
      return attend_run<0, 64, T>;
  }
}

}  // namespace

void cross_view_attention(const CrossViewAttentionArgs& given) {
  CrossViewAttentionArgs args = given;
  const int64_t units = args.batch * args.heads * args.length;
  if (units * args.head_dim == 0) return;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = units * args.views * args.head_dim * int64_t(sizeof(T));
    const int64_t runs = min_of(units, min_of(max_threads(), ceil_div(bytes, kMinRunBytes)));
    const auto attend_run = run_for<T>(args);
    parallel_runs(runs, [&](int64_t run) { attend_run(args, units * run / runs, units * (run + 1) / runs); });
  });
}

}  // namespace gafext::GAFEXT_ISA
