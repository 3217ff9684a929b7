// Attention over the views of one portrait, at each spatial position by itself.
//
// A sequence has V = 2..32 tokens, so the work is memory traffic: 4 V D elements for 4 V^2 D operations. A thread takes
// a run of positions and, for each, goes through the heads: in a (batch, length, heads, head_dim) memory that is one
// pass over V rows of each tensor, in place. Per (position, head):
//
//   pack     V rows of Q, K and V as float32 into the L1 cache              [V, D'] each, D' = D in whole vectors
//   scores   S^T[j, i] = <q_i, k_j>, kLanes dot products at a time          [V, V]
//   softmax  down the columns of S^T: a lane is a query view, no shuffles   log2(e) and scale are folded into Q
//   values   O[i, :] = sum_j P^T[j, i] v_j
#include "vector.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int64_t kPositions = 16;  // of a unit of work

// One thread's memory. Every part begins at a whole vector.
struct Scratch {
  float *query, *key, *value;  // [views, head_floats]
  float* scores;               // [views, views] transposed, and a vector of room

  static int64_t floats(const CrossViewAttentionArgs& args) {
    return 3 * args.views * round_up(args.head_dim, kLanes) + round_up(args.views * args.views, kLanes) + kLanes;
  }
  Scratch(const CrossViewAttentionArgs& args, float* memory) {
    const int64_t part = args.views * round_up(args.head_dim, kLanes);
    query = memory;
    key = query + part;
    value = key + part;
    scores = value + part;
  }
};

// scores[j, i] = <query_i, key_j>
void score(int64_t views, int64_t head_floats, const Scratch& scratch) {
  for (int64_t pair = 0; pair < views * views; pair += kLanes) {
    Vec products[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t p = min_of(pair + lane, views * views - 1);
      const float *query = scratch.query + p % views * head_floats, *key = scratch.key + p / views * head_floats;
      Vec sum = load(query) * load(key);
      for (int64_t d = kLanes; d < head_floats; d += kLanes) sum += load(query + d) * load(key + d);
      products[lane] = sum;
    }
    store(scratch.scores + pair, sums_of(products));
  }
}

// Softmax of every column, kLanes columns at a time. Lanes past the last view hold the next row's scores, and are not
// written back.
void softmax(int64_t views, const Scratch& scratch) {
  Vec weights[kMaxViews];
  for (int64_t i = 0; i < views; i += kLanes) {
    Vec highest = broadcast(-kInfinity), sum = {};
    for (int64_t j = 0; j < views; ++j) highest = max_of(load(scratch.scores + j * views + i), highest);
    highest = highest == -kInfinity ? Vec{} : highest;  // every score -inf: weights of 0, not NaN
    for (int64_t j = 0; j < views; ++j) {
      weights[j] = exp2_of(load(scratch.scores + j * views + i) - highest);
      sum += weights[j];
    }
    const Vec inverse = sum == 0.0f ? Vec{} : 1.0f / sum;
    const int64_t lanes = min_of(kLanes, views - i);
    for (int64_t j = 0; j < views; ++j) store_first(scratch.scores + j * views + i, weights[j] * inverse, lanes);
  }
}

// out_i = sum_j weights[j, i] value_j
template <typename T>
void combine(const CrossViewAttentionArgs& args, int64_t head_floats, const Scratch& scratch, T* out) {
  for (int64_t i = 0; i < args.views; ++i) {
    T* to = out + i * args.out_stride.batch;
    for (int64_t d = 0; d < args.head_dim; d += kLanes) {
      Vec sum = {};
      for (int64_t j = 0; j < args.views; ++j) {
        sum += scratch.scores[j * args.views + i] * load(scratch.value + j * head_floats + d);
      }
      const int64_t width = min_of(kLanes, args.head_dim - d);
      width == kLanes ? store(to + d, sum) : store_first(to + d, sum, width);
    }
  }
}

template <typename T>
void attend(const CrossViewAttentionArgs& args, int64_t batch, int64_t head, int64_t position, const Scratch& scratch) {
  const int64_t head_floats = round_up(args.head_dim, kLanes);
  const auto rows_of = [&](const void* base, const HeadStrides& stride) {
    return static_cast<const T*>(base) + batch * args.views * stride.batch + head * stride.head + position * stride.row;
  };
  const T* query = rows_of(args.query, args.query_stride);
  const T* key = rows_of(args.key, args.key_stride);
  const T* value = rows_of(args.value, args.value_stride);
  for (int64_t i = 0; i < args.views; ++i) {
    copy_row(scratch.query + i * head_floats, query + i * args.query_stride.batch, args.head_dim, args.scale * kLog2E);
    copy_row(scratch.key + i * head_floats, key + i * args.key_stride.batch, args.head_dim);
    copy_row(scratch.value + i * head_floats, value + i * args.value_stride.batch, args.head_dim);
  }
  score(args.views, head_floats, scratch);
  softmax(args.views, scratch);
  combine(args, head_floats, scratch, const_cast<T*>(rows_of(args.out, args.out_stride)));
}

}  // namespace

void cross_view_attention(const CrossViewAttentionArgs& args) {
  if (args.batch * args.heads * args.length * args.head_dim == 0) return;
  const int64_t runs = ceil_div(args.length, kPositions), floats = Scratch::floats(args);
  float* memory = scratch(max_threads() * floats);
  with_element_type(args.dtype, [&](auto element) {
    parallel_for(args.batch * runs, [&](int64_t thread, int64_t unit) {
      const Scratch mine(args, memory + thread * floats);
      const int64_t begin = unit % runs * kPositions, end = min_of(args.length, begin + kPositions);
      for (int64_t position = begin; position < end; ++position) {
        for (int64_t head = 0; head < args.heads; ++head) {
          attend<decltype(element)>(args, unit / runs, head, position, mine);
        }
      }
    });
  });
}

}  // namespace gafext::GAFEXT_ISA
