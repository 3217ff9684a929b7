// The projection of GEGLU with the gate in its epilogue: the (rows, 2 inner) intermediate never reaches memory.
//
// A unit of work is a panel of output columns times a block of rows. It takes slices of kDepth features:
//
//   weights  transposed: kColumns value columns beside their kColumns gate columns    [kDepth, kPanel], in the L2 cache
//   product  sums += x W^T in register tiles, while the next slice's weights come in  [rows, kPanel], in the L2 cache
//
// and after the last slice out = value * gelu(gate). Transposing takes 16 shuffles per vector of weights, once per
// block of rows, which is 3 % of the time for 500 rows.
#include "../ops/geglu.h"

#include "amx/geglu.h"
#include "gemm.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kColumns = kPanel / 2;  // output columns of a panel
constexpr int64_t kDepth = 128;    // features of a slice: their weights fit the L1 cache, and short sums round less
constexpr int64_t kMaxRows = 504;  // of a unit; their sums take 129 KB
constexpr int64_t kGateFloats = 16384;  // of the result, that a thread takes at a time where the projection is given
constexpr int64_t kMinRows = 96;        // of a unit, below which transposing the weights shows

// Elements ahead that are prefetched there: 12 to 16% faster with memory that no cache holds, 2 to 5% with memory that
// one does.
constexpr int64_t kGateAhead = 128;

// One thread's memory. Every part begins at a whole vector.
struct Scratch {
  float* weight;  // [kDepth, kPanel]: kColumns values, kColumns gates
  float* bias;    // [kPanel]
  float* x;       // [kTileRows, kDepth], for rows that are not float32
  float* sums;    // [rows, kPanel]

  static int64_t floats(int64_t rows) { return (kDepth + 1 + rows) * kPanel + kTileRows * kDepth; }
  explicit Scratch(float* memory) {
    weight = memory;
    bias = weight + kDepth * kPanel;
    x = bias + kPanel;
    sums = x + kTileRows * kDepth;
  }
};

// Output columns [first, first + columns), columns <= kColumns, and rows [row, row + rows).
struct Unit {
  int64_t first, columns, row, rows;
};

// The weight's row that panel column `c` holds, c a multiple of kLanes.
int64_t weight_row(const GegluArgs& args, const Unit& unit, int64_t c) {
  return (c < kColumns ? 0 : args.inner) + unit.first + c % kColumns;
}

int64_t weight_rows(const Unit& unit, int64_t c) { return max_of(0, min_of(kLanes, unit.columns - c % kColumns)); }

// Features [k, k + depth) of the panel; missing columns are zero.
template <typename T>
void pack_weight(const GegluArgs& args, const Unit& unit, int64_t k, int64_t depth, float* to) {
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    const T* from = static_cast<const T*>(args.weight) + weight_row(args, unit, c) * args.weight_stride + k;
    transpose_rows(to + c, kPanel, from, args.weight_stride, weight_rows(unit, c), depth);
  }
}

template <typename T>
void pack_bias(const GegluArgs& args, const Unit& unit, float* to) {
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    store(to + c, bias == nullptr ? Vec{} : load_first(bias + weight_row(args, unit, c), weight_rows(unit, c)));
  }
}

// sums (+)= x W^T over features [k, k + depth).
template <typename T>
void multiply_slice(const GegluArgs& args, const Unit& unit, int64_t k, int64_t depth, const Scratch& scratch) {
  const T *x = static_cast<const T*>(args.x) + unit.row * args.x_stride + k,
          *weight = static_cast<const T*>(args.weight);
  const int64_t after = min_of(kDepth, args.in_features - k - depth), calls = ceil_div(unit.rows, kTileRows);
  Prefetcher next[2];
  for (int half = 0; half < 2; ++half) {
    next[half] = Prefetcher(weight + weight_row(args, unit, half * kColumns) * args.weight_stride + k + depth,
                            args.weight_stride * sizeof(T), unit.columns, after * sizeof(T), calls);
  }
  for (int64_t r = 0; r < unit.rows; r += kTileRows) {
    const int64_t rows = min_of(kTileRows, unit.rows - r);
    next[0].fetch();
    next[1].fetch();
    if constexpr (sizeof(T) == sizeof(float)) {
      multiply_rows(rows, x + r * args.x_stride, args.x_stride, scratch.weight, depth, scratch.sums + r * kPanel,
                    kPanel, k > 0);
    } else {
      for (int64_t i = 0; i < rows; ++i) copy_row(scratch.x + i * kDepth, x + (r + i) * args.x_stride, depth);
      multiply_rows(rows, scratch.x, kDepth, scratch.weight, depth, scratch.sums + r * kPanel, kPanel, k > 0);
    }
  }
}

template <typename T>
void write_gated(const GegluArgs& args, const Unit& unit, const Scratch& scratch) {
  for (int64_t r = 0; r < unit.rows; ++r) {
    T* out = static_cast<T*>(args.out) + (unit.row + r) * args.inner + unit.first;
    for (int64_t c = 0; c < unit.columns; c += kLanes) {
      const float *sums = scratch.sums + r * kPanel + c, *bias = scratch.bias + c;
      const Vec gate = load(sums + kColumns) + load(bias + kColumns);
      const Vec gated = (load(sums) + load(bias)) * gelu_of(gate);
      unit.columns - c >= kLanes ? store(out + c, gated) : store_first(out + c, gated, unit.columns - c);
    }
  }
}

template <typename T>
void project(const GegluArgs& args, const Unit& unit, const Scratch& scratch) {
  if (args.in_features == 0) {
    for (int64_t i = 0; i < unit.rows * kPanel; ++i) scratch.sums[i] = 0.0f;
  }
  pack_bias<T>(args, unit, scratch.bias);
  for (int64_t k = 0; k < args.in_features; k += kDepth) {
    const int64_t depth = min_of(kDepth, args.in_features - k);
    pack_weight<T>(args, unit, k, depth, scratch.weight);
    multiply_slice<T>(args, unit, k, depth, scratch);
  }
  write_gated<T>(args, unit, scratch);
}

}  // namespace

void geglu(const GegluArgs& args) {
  if (args.rows * args.inner == 0) return;
#if defined(__AMX_BF16__)
  bool done = false;
  with_element_type(args.dtype, [&](auto element) { done = geglu_on_tiles<decltype(element)>(args); });
  if (done) return;
#endif
  const int64_t panels = ceil_div(args.inner, kColumns);
  int64_t blocks = ceil_div(args.rows, kMaxRows);  // of rows; more where threads would be left without a unit
  while (args.rows / blocks >= 2 * kMinRows && panels * blocks < 4 * max_threads()) blocks *= 2;
  const int64_t rows = round_up(ceil_div(args.rows, blocks), kTileRows), floats = Scratch::floats(rows);
  blocks = ceil_div(args.rows, rows);

  float* memory = scratch(max_threads() * floats);
  with_element_type(args.dtype, [&](auto element) {
    parallel_for(panels * blocks, [&](int64_t thread, int64_t index) {
      const int64_t first = index % panels * kColumns, row = index / panels * rows;
      const Unit unit{first, min_of(kColumns, args.inner - first), row, min_of(rows, args.rows - row)};
      project<decltype(element)>(args, unit, Scratch(memory + thread * floats));
    });
  });
}

void geglu_gate(const GegluGateArgs& args) {
  const int64_t block = max_of(1, kGateFloats / max_of(args.inner, 1)), blocks = ceil_div(args.rows, block);
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(args.inner == 0 ? 0 : blocks, [&](int64_t, int64_t unit) {
      for (int64_t r = unit * block; r < min_of(args.rows, (unit + 1) * block); ++r) {
        const T *value = static_cast<const T*>(args.projected) + r * args.projected_stride, *gate = value + args.inner;
        T* out = static_cast<T*>(args.out) + r * args.inner;
        int64_t c = 0;
        for (; c + kLanes <= args.inner; c += kLanes) {
          __builtin_prefetch(value + c + kGateAhead);
          __builtin_prefetch(gate + c + kGateAhead);
          prefetch_to_write(out + c + kGateAhead);
          store(out + c, load(value + c) * gelu_of(load(gate + c)));
        }
        const int64_t rest = args.inner - c;
        if (rest > 0) store_first(out + c, load_first(value + c, rest) * gelu_of(load_first(gate + c, rest)), rest);
      }
    });
  });
}

}  // namespace gafext::GAFEXT_ISA
