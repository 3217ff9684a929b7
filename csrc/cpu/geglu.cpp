// The projection of GEGLU with the gate in its epilogue: the (rows, 2 inner) intermediate never reaches memory.
//
// A unit of work is a panel of output columns times a block of rows. The thread packs the panel's weights once,
// kColumns value columns beside their kColumns gate columns, and sweeps over the rows, kTileRows at a time: a register
// tile collects x W^T over a block of in_features, the blocks add up in the L1 cache, and the last step is
// value * gelu(gate). Weights are read once per row block and never written back.
#include "vector.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int kHalf = kTileVectors / 2;            // vectors of values in a tile, and as many of gates
constexpr int64_t kColumns = kHalf * kLanes;       // output columns of a panel
constexpr int64_t kPanel = kTileVectors * kLanes;  // floats in a row of the packed panel
constexpr int64_t kBlock = 256;   // of in_features: one float32 chain of 640 loses a digit, blocks of 256 do not
constexpr int64_t kMinRows = 96;  // of a unit, below which packing the weights shows

// One thread's memory. Every part begins at a whole vector.
struct Scratch {
  float* weight;  // [in_features, kPanel]: kColumns values, kColumns gates
  float* bias;    // [kPanel]
  float* x;       // [kTileRows, kBlock]
  float* sums;    // [kTileRows, kPanel]

  static int64_t floats(const GegluArgs& args) {
    return (args.in_features + 1 + kTileRows) * kPanel + kTileRows * kBlock;
  }
  Scratch(const GegluArgs& args, float* memory) {
    weight = memory;
    bias = weight + args.in_features * kPanel;
    x = bias + kPanel;
    sums = x + kTileRows * kBlock;
  }
};

// Output columns [first, first + columns), columns <= kColumns; missing ones are zero.
template <typename T>
void pack_weight(const GegluArgs& args, int64_t first, int64_t columns, const Scratch& scratch) {
  const T *weight = static_cast<const T*>(args.weight), *bias = static_cast<const T*>(args.bias);
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    const int64_t offset = c % kColumns, count = max_of(0, min_of(kLanes, columns - offset));
    const int64_t row = (c < kColumns ? 0 : args.inner) + first + offset;
    transpose_rows(scratch.weight + c, kPanel, weight + row * args.weight_stride, args.weight_stride, count,
                   args.in_features);
    store(scratch.bias + c, bias != nullptr ? load_first(bias + row, count) : Vec{});
  }
}

// sums[r, :] += sum_k x[r, k] weight[k, :] over one block of in_features.
void multiply_block(const float* x, const float* weight, int64_t features, float* sums) {
  Vec tile[kTileRows][kTileVectors] = {};
  for (int64_t k = 0; k < features; ++k) {
    Vec column[kTileVectors];
    GAFEXT_UNROLL
    for (int c = 0; c < kTileVectors; ++c) column[c] = load(weight + k * kPanel + c * kLanes);
    GAFEXT_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const Vec factor = broadcast(x[r * kBlock + k]);
      GAFEXT_UNROLL
      for (int c = 0; c < kTileVectors; ++c) tile[r][c] += factor * column[c];
    }
  }
  GAFEXT_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    GAFEXT_UNROLL
    for (int c = 0; c < kTileVectors; ++c) {
      float* sum = sums + r * kPanel + c * kLanes;
      store(sum, load(sum) + tile[r][c]);
    }
  }
}

// Rows [row, row + rows), rows <= kTileRows, times the packed panel, gated, into `columns` columns of out.
template <typename T>
void project_rows(const GegluArgs& args, int64_t row, int64_t rows, int64_t first, int64_t columns,
                  const Scratch& scratch) {
  const T* x = static_cast<const T*>(args.x);
  for (int r = 0; r < kTileRows; ++r) copy_row(scratch.sums + r * kPanel, scratch.bias, kPanel);
  for (int64_t k = 0; k < args.in_features; k += kBlock) {
    const int64_t features = min_of(kBlock, args.in_features - k);
    for (int64_t r = 0; r < kTileRows; ++r) {
      copy_row(scratch.x + r * kBlock, x + (row + min_of(r, rows - 1)) * args.x_stride + k, features);
    }
    multiply_block(scratch.x, scratch.weight + k * kPanel, features, scratch.sums);
  }
  T* out = static_cast<T*>(args.out) + row * args.inner + first;
  for (int64_t r = 0; r < rows; ++r) {
    const float* value = scratch.sums + r * kPanel;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Vec gated = load(value + c) * gelu_of(load(value + kColumns + c));
      T* to = out + r * args.inner + c;
      columns - c >= kLanes ? store(to, gated) : store_first(to, gated, columns - c);
    }
  }
}

}  // namespace

void geglu(const GegluArgs& args) {
  if (args.rows * args.inner == 0) return;
  const int64_t panels = ceil_div(args.inner, kColumns), floats = Scratch::floats(args);
  int64_t block = args.rows;  // rows of a unit: all of them, if that gives every thread enough units
  while (block >= 2 * kMinRows && panels * ceil_div(args.rows, block) < 4 * max_threads()) block = ceil_div(block, 2);
  const int64_t blocks = ceil_div(args.rows, block);

  float* memory = scratch(max_threads() * floats);
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(panels * blocks, [&](int64_t thread, int64_t unit) {
      const Scratch mine(args, memory + thread * floats);
      const int64_t first = unit / blocks * kColumns, columns = min_of(kColumns, args.inner - first);
      const int64_t begin = unit % blocks * block, end = min_of(args.rows, begin + block);
      pack_weight<T>(args, first, columns, mine);
      for (int64_t row = begin; row < end; row += kTileRows) {
        project_rows<T>(args, row, min_of(kTileRows, end - row), first, columns, mine);
      }
    });
  });
}

}  // namespace gafext::GAFEXT_ISA
