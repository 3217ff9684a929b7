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
#include "cross_view_tiles.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kLineBytes = 64;
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
  if (args.batch * args.heads * args.length * args.head_dim == 0) return;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto attend_run = run_for<T>(args);
    parallel_units<T>(args, [&](int64_t begin, int64_t end) { attend_run(args, begin, end); });
  });
}

}  // namespace gafext::GAFEXT_ISA
