// The gradients of cross_view_attention, at each (position, head) by itself: 4 V rows are read and 3 V written, in place.
//
// With cross_view_attention's tiles, for all queries:
//
//   weights   P = softmax(scale Q K^T), computed anew: V^2 numbers, where the forward pass would save what it read
//   changes   dS = scale P * (dO V^T - rowsum(P * dO V^T))
//   sums      dV = P^T dO, dQ = dS K, dK = dS^T Q
#include "cross_view_tiles.h"

namespace gafext::GAFEXT_ISA {
namespace {

// [views, views] in score tiles, of which `quads` hold a query's keys.
struct ScoreMatrix {
  int64_t quads;
  alignas(64) float tiles[ceil_div(kMaxViews, kTileQueries) * kMaxViews / kQuad * kLanes];

  explicit ScoreMatrix(int64_t views) : quads(ceil_div(views, kQuad)) {}

  GAFEXT_INLINE float* tile(int64_t first_query) { return tiles + first_query / kTileQueries * quads * kLanes; }
  GAFEXT_INLINE float& at(int64_t query, int64_t key) {
    return tile(query)[key / kQuad * kLanes + query % kTileQueries * kQuad + key % kQuad];
  }
  GAFEXT_INLINE void set_transposed(ScoreMatrix& from, int64_t views) {
    for (int64_t i = 0; i < views; ++i) {
      for (int64_t j = 0; j < views; ++j) at(i, j) = from.at(j, i);
    }
  }
};

// The rows by the product that they are in: `scores` has Q and K, `changes` dO and V. A result is the sum over the
// product's `value`.
template <typename T, int kViews>
struct GradientRows {
  Rows<T, kViews> scores;   // Q, K; sums of K into dQ
  Rows<T, kViews> changes;  // dO, V; sums of dO into dV
  Rows<T, kViews> queries;  // sums of Q into dK

  void find(const CrossViewAttentionBackwardArgs& args, const Place& at, int64_t views) {
    const auto find_inputs = [&](const T** rows, const void* base, const HeadStrides& stride) {
      find_views(rows, static_cast<const T*>(base), stride, at, views);
    };
    const auto find_results = [&](T** rows, void* base) {
      find_views(rows, static_cast<T*>(base), args.out_stride, at, views);
    };
    find_inputs(scores.query, args.query, args.query_stride);
    find_inputs(scores.key, args.key, args.key_stride);
    find_inputs(changes.query, args.grad, args.grad_stride);
    find_inputs(changes.key, args.value, args.value_stride);
    find_results(scores.out, args.grad_query);
    find_results(changes.out, args.grad_value);
    find_results(queries.out, args.grad_key);
    for (int64_t i = 0; i < views; ++i) {
      scores.value[i] = scores.key[i], changes.value[i] = changes.query[i], queries.value[i] = scores.query[i];
    }
  }

  // Zeros follow the `head_dim` < kLanes columns of `from` in `memory`, [7, kViews, kLanes].
  template <typename From>
  void pad(const GradientRows<From, kViews>& from, float* memory, int64_t views, int64_t head_dim) {
    for (int64_t i = 0; i < views; ++i) {
      float* row = memory + i * kLanes;
      const auto next = [&] { return row += kViews * kLanes; };
      const auto copy = [&](const From* source) {
        store(row, load_first(source, head_dim));
        return row;
      };
      scores.query[i] = queries.value[i] = copy(from.scores.query[i]), next();
      scores.key[i] = scores.value[i] = copy(from.scores.key[i]), next();
      changes.query[i] = changes.value[i] = copy(from.changes.query[i]), next();
      changes.key[i] = copy(from.changes.key[i]);
      scores.out[i] = next(), changes.out[i] = next(), queries.out[i] = next();
    }
  }
};

// The tiles of dS, from those of P.
template <typename T, int kViews>
GAFEXT_INLINE void change_scores(const Rows<T, kViews>& rows, int64_t views, int64_t head_dim, int64_t first_query,
                                 float scale, const float* weights, float* changes) {
  const int64_t quads = ceil_div(views, kQuad);
  Vec change[kMaxViews / kQuad], sum = {};
  for (int64_t quad = 0; quad < quads; ++quad) {
    change[quad] = score_tile(rows, views, head_dim, first_query, quad * kQuad);
    sum += load(weights + quad * kLanes) * change[quad];
  }
  sum = fold_quads(sum, [](Vec a, Vec b) { return a + b; }, AllLanes());
  for (int64_t quad = 0; quad < quads; ++quad) {
    store(changes + quad * kLanes, load(weights + quad * kLanes) * (change[quad] - sum) * scale);
  }
}

template <typename T, int kViews>
GAFEXT_INLINE void differentiate(const GradientRows<T, kViews>& rows, int64_t views, int64_t head_dim, float scale) {
  ScoreMatrix weights(views), changes(views), transposed(views);
  for (int64_t i = 0; i < views; i += kTileQueries) {
    weigh(rows.scores, views, head_dim, i, scale, weights.tile(i));
    change_scores(rows.changes, views, head_dim, i, scale, weights.tile(i), changes.tile(i));
  }
  const auto sum = [&](const Rows<T, kViews>& product, ScoreMatrix& factors) {
    for (int64_t i = 0; i < views; i += kTileQueries) {
      combine_columns(product, views, head_dim, i, factors.tile(i));
    }
  };
  sum(rows.scores, changes);
  transposed.set_transposed(changes, views);
  sum(rows.queries, transposed);
  transposed.set_transposed(weights, views);
  sum(rows.changes, transposed);
}

// Units [begin, end) of the (batch, position, head). The sizes are known at compile time unless they are 0.
template <int kViews, int kHeadDim, typename T>
void differentiate_run(const CrossViewAttentionBackwardArgs& args, int64_t begin, int64_t end) {
  constexpr int kMost = kViews > 0 ? kViews : kMaxViews;
  const int64_t views = kViews > 0 ? kViews : args.views, head_dim = kHeadDim > 0 ? kHeadDim : args.head_dim;
  GradientRows<T, kMost> rows;
  Place place(args, begin);
  for (int64_t unit = begin; unit < end; ++unit, place.advance(args)) {
    rows.find(args, place, views);
    differentiate(rows, views, head_dim, args.scale);
  }
}

// Heads narrower than a vector.
template <typename T>
void differentiate_narrow_run(const CrossViewAttentionBackwardArgs& args, int64_t begin, int64_t end) {
  alignas(64) float memory[7 * kMaxViews * kLanes];
  GradientRows<T, kMaxViews> rows;
  GradientRows<float, kMaxViews> padded;
  Place place(args, begin);
  for (int64_t unit = begin; unit < end; ++unit, place.advance(args)) {
    rows.find(args, place, args.views);
    padded.pad(rows, memory, args.views, args.head_dim);
    differentiate(padded, args.views, kLanes, args.scale);
    for (int64_t i = 0; i < args.views; ++i) {
      store_first(rows.scores.out[i], load(padded.scores.out[i]), args.head_dim);
      store_first(rows.changes.out[i], load(padded.changes.out[i]), args.head_dim);
      store_first(rows.queries.out[i], load(padded.queries.out[i]), args.head_dim);
    }
  }
}

template <typename T>
auto run_for(const CrossViewAttentionBackwardArgs& args) {
  if (args.head_dim < kLanes) return differentiate_narrow_run<T>;
  return args.views == 4 && args.head_dim == 64 ? differentiate_run<4, 64, T> : differentiate_run<0, 0, T>;
}

}  // namespace

void cross_view_attention_backward(const CrossViewAttentionBackwardArgs& args) {
  if (args.batch * args.heads * args.length * args.head_dim == 0) return;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto differentiate_run = run_for<T>(args);
    parallel_units<T>(args, [&](int64_t begin, int64_t end) { differentiate_run(args, begin, end); });
  });
}

}  // namespace gafext::GAFEXT_ISA
