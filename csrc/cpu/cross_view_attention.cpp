// Attention over the views of one portrait, at each spatial position by itself: V rows of each tensor, read in place.
//
// A (position, head) moves 4 V D elements and takes 4 V^2 D operations: in float32 V/4 operations a byte, where a core
// could do about 10. So the work is memory traffic, and memory sets the plan:
//
//   thread   one contiguous run of the (batch, position, head), heads fastest: in (batch, length, heads, head_dim)
//            memory V ascending streams of each tensor, touched once and never copied
//   ahead    all 4 V rows of the next (position, head), by software: 16 streams and more are beyond the hardware's
//            prefetchers. A few rows at each group of queries: all in one burst was 10 to 20% slower in the caches
//
// The rest stays in registers and in 2 KB of weights. For kLanes / 4 queries at a time (with AVX-512 all of V = 4):
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
// Measured on two cores of a Sapphire Rapids, float32, caches cold: 1.1 to 1.2 times the speed of a large copy of the
// same bytes for V = 4, 6 and 8, and 0.95 for V = 16, where the arithmetic shows. Packing Q, K and V first took twice
// the time. Non-temporal stores make the kernel 1.2 times faster, but the kernel and a pass over its result 3 to 5%
// slower. Prefetching `out` as well is worth 2% cold.
#include "vector.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int kQuad = 4;                      // keys of a score tile
constexpr int kTileQueries = kLanes / kQuad;  // queries of a score tile: every lane is one score
constexpr int64_t kLineBytes = 64;
constexpr int64_t kMinRunBytes = 64 * 1024;  // of one tensor: less is not worth waking a thread for

// The rows of one (position, head): row i is view i.
template <typename T>
struct Views {
  T* first;
  int64_t stride;

  T* operator[](int64_t view) const { return first + view * stride; }
};

template <typename T>
struct Tensors {
  Views<const T> query, key, value;
  Views<T> out;
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

template <typename T>
GAFEXT_INLINE Views<T> views_at(const CrossViewAttentionArgs& args, void const* base, const HeadStrides& stride,
                                const Place& at) {
  T* first = static_cast<T*>(const_cast<void*>(base));
  return {first + at.batch * args.views * stride.batch + at.position * stride.row + at.head * stride.head,
          stride.batch};
}

template <typename T>
GAFEXT_INLINE Tensors<T> tensors_at(const CrossViewAttentionArgs& args, const Place& at) {
  return {views_at<const T>(args, args.query, args.query_stride, at),
          views_at<const T>(args, args.key, args.key_stride, at),
          views_at<const T>(args, args.value, args.value_stride, at), views_at<T>(args, args.out, args.out_stride, at)};
}

// The rows of the views [first, end).
template <typename T>
GAFEXT_INLINE void prefetch(const Tensors<T>& tensors, int64_t first, int64_t end, int64_t head_dim) {
  for (int64_t i = first; i < end; ++i) {
    for (int64_t d = 0; d < head_dim; d += kLineBytes / int64_t(sizeof(T))) {
      __builtin_prefetch(tensors.query[i] + d);
      __builtin_prefetch(tensors.key[i] + d);
      __builtin_prefetch(tensors.value[i] + d);
      __builtin_prefetch(tensors.out[i] + d, 1);
    }
  }
}

// Every lane becomes the fold over the kQuad lanes that it is one of.
template <typename Fold, int... I>
GAFEXT_INLINE Vec fold_quads(Vec v, Fold fold, Lanes<I...>) {
  v = fold(v, GAFEXT_SHUFFLE(v, v, (I ^ 1)));
  return fold(v, GAFEXT_SHUFFLE(v, v, (I ^ 2)));
}

// Lane i * kQuad + j is <query[first_query + i], key[first_key + j]>. Past the last view that one counts again.
template <typename T>
GAFEXT_INLINE Vec score_tile(const Tensors<T>& tensors, int64_t views, int64_t head_dim, int64_t first_query,
                             int64_t first_key) {
  const T *query[kTileQueries], *key[kQuad];
  GAFEXT_UNROLL
  for (int i = 0; i < kTileQueries; ++i) query[i] = tensors.query[min_of(first_query + i, views - 1)];
  GAFEXT_UNROLL
  for (int j = 0; j < kQuad; ++j) key[j] = tensors.key[min_of(first_key + j, views - 1)];

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
template <typename T>
GAFEXT_INLINE void weigh(const Tensors<T>& tensors, int64_t views, int64_t head_dim, int64_t first_query, float scale,
                         float* weights) {
  const int64_t quads = ceil_div(views, kQuad);
  const IntVec key_in_quad = lane_numbers(AllLanes()) & (kQuad - 1);
  Vec scores[kMaxViews / kQuad], highest = broadcast(-kInfinity), sum = {};
  for (int64_t quad = 0; quad < quads; ++quad) {
    const int64_t first_key = quad * kQuad;
    Vec score = score_tile(tensors, views, head_dim, first_query, first_key) * scale;
    if (first_key + kQuad > views) score = key_in_quad < int32_t(views - first_key) ? score : broadcast(-kInfinity);
    scores[quad] = score;
    highest = max_of(score, highest);
  }
  highest = fold_quads(highest, [](Vec a, Vec b) { return max_of(a, b); }, AllLanes());
  highest = highest == -kInfinity ? Vec{} : highest;  // every score -inf: weights of 0, not NaN
  for (int64_t quad = 0; quad < quads; ++quad) {
    scores[quad] = exp2_of((scores[quad] - highest) * kLog2E);
    sum += scores[quad];
  }
  sum = fold_quads(sum, [](Vec a, Vec b) { return a + b; }, AllLanes());
  const Vec inverse = sum == 0.0f ? Vec{} : 1.0f / sum;
  for (int64_t quad = 0; quad < quads; ++quad) store(weights + quad * kLanes, scores[quad] * inverse);
}

// out[first_query + i, d...] = sum_j weights[j / kQuad][i][j % kQuad] value[j, d...], `vectors` of them.
template <int vectors, typename T>
GAFEXT_INLINE void combine(const Tensors<T>& tensors, int64_t views, int64_t first_query, const float* weights,
                           int64_t d) {
  Vec sums[kTileQueries][vectors] = {};
  for (int64_t j = 0; j < views; ++j) {
    const T* value = tensors.value[j] + d;
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
    T* out = tensors.out[first_query + i] + d;
    GAFEXT_UNROLL
    for (int c = 0; c < vectors; ++c) store(out + c * kLanes, sums[i][c]);
  }
}

// One (position, head), head_dim >= kLanes, while the rows of `next` come from memory.
template <typename T>
GAFEXT_INLINE void attend(const Tensors<T>& tensors, const Tensors<T>& next, int64_t views, int64_t head_dim,
                          float scale) {
  alignas(64) float weights[kMaxViews / kQuad * kLanes];
  for (int64_t i = 0; i < views; i += kTileQueries) {
    prefetch(next, i, min_of(i + kTileQueries, views), head_dim);
    weigh(tensors, views, head_dim, i, scale, weights);
    int64_t d = 0;
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) combine<4>(tensors, views, i, weights, d);
    if (d + 2 * kLanes <= head_dim) combine<2>(tensors, views, i, weights, d), d += 2 * kLanes;
    if (d + kLanes <= head_dim) combine<1>(tensors, views, i, weights, d), d += kLanes;
    if (d < head_dim) combine<1>(tensors, views, i, weights, head_dim - kLanes);
  }
}

// A head narrower than a vector is padded with zeros. Its rows are so short that the hardware's prefetching will do.
template <typename T>
void attend_narrow(const Tensors<T>& tensors, int64_t views, int64_t head_dim, float scale) {
  float query[kMaxViews * kLanes], key[kMaxViews * kLanes], value[kMaxViews * kLanes], out[kMaxViews * kLanes];
  for (int64_t i = 0; i < views; ++i) {
    store(query + i * kLanes, load_first(tensors.query[i], head_dim));
    store(key + i * kLanes, load_first(tensors.key[i], head_dim));
    store(value + i * kLanes, load_first(tensors.value[i], head_dim));
  }
  const Tensors<float> padded = {{query, kLanes}, {key, kLanes}, {value, kLanes}, {out, kLanes}};
  attend(padded, padded, views, kLanes, scale);
  for (int64_t i = 0; i < views; ++i) store_first(tensors.out[i], load(out + i * kLanes), head_dim);
}

// Units [begin, end) of the (batch, position, head), each with the next one on its way from memory. The sizes are
// known at compile time unless they are 0.
template <int kViews, int kHeadDim, typename T>
void attend_run(const CrossViewAttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t views = kViews > 0 ? kViews : args.views, head_dim = kHeadDim > 0 ? kHeadDim : args.head_dim;
  Place place(args, begin);
  Tensors<T> next = tensors_at<T>(args, place);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Tensors<T> here = next;
    place.advance(args);
    next = tensors_at<T>(args, place);
    if (head_dim < kLanes) {
      attend_narrow(here, views, head_dim, args.scale);
    } else {
      attend(here, next, views, head_dim, args.scale);
    }
  }
}

template <typename T>
auto run_for(const CrossViewAttentionArgs& args) {
  if (args.head_dim != 64) return attend_run<0, 0, T>;
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
    parallel_for(runs, [&](int64_t, int64_t run) { attend_run(args, units * run / runs, units * (run + 1) / runs); });
  });
}

}  // namespace gafext::GAFEXT_ISA
