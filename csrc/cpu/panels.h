// Linear layers in float32 arithmetic, whatever the memory holds: f(x weight^T), where `Layer` says which rows of the
// weight make up a panel, kPanel columns of the product, and what becomes of its sums. Where the processor multiplies
// bfloat16 (pairs.h), in that.
//
// A unit of work is a block of rows times a group of panels. It takes slices of kDepth features:
//
//   x        to float32, if it is not; once for the group                             [rows, kDepth], in the L2 cache
//   weights  transposed, panel by panel                                               [kDepth, kPanel], in the L1 cache
//   product  sums += x W^T in register tiles, while the next weights come in          [rows, kPanel], in the L2 cache
//
// and after the last slice the layer writes its columns. Transposing takes 16 shuffles per vector of weights, once per
// block of rows, which is 3 % of the time for 500 rows.
#pragma once

#include "gemm.h"

namespace gafext::GAFEXT_ISA {
namespace {

// Number: what is multiplied, float, or words of two features. Those take an even number of features, and rows of x an
// even number of elements apart.
template <typename T, typename Layer, typename Number = float>
class PanelProduct {
 public:
  explicit PanelProduct(const Layer& layer) : layer_(layer), args_(layer.args) {
    const int64_t columns = kGroup * Layer::kColumns;
    groups_ = ceil_div(layer.columns(), columns);
    blocks_ = ceil_div(args_.rows, kMaxRows);  // more where threads would be left without a unit
    while (args_.rows / blocks_ >= 2 * kMinRows && groups_ * blocks_ < 4 * max_threads()) blocks_ *= 2;
    rows_ = round_up(ceil_div(args_.rows, blocks_), kTileRows);
    blocks_ = ceil_div(args_.rows, rows_);
  }

  void run() {
    const int64_t floats = (kWords + kGroup + kGroup * rows_) * kPanel + (kWidens ? rows_ * kDepth : 0);
    float* memory = scratch(max_threads() * floats);
    parallel_for(groups_ * blocks_, [&](int64_t thread, int64_t index) {
      const int64_t row = index / groups_ * rows_;
      const Unit unit{index % groups_ * kGroup * Layer::kColumns, row, min_of(rows_, args_.rows - row)};
      Scratch parts;
      parts.weight = reinterpret_cast<Number*>(memory + thread * floats);
      parts.bias = memory + thread * floats + kWords * kPanel;
      parts.sums = parts.bias + kGroup * kPanel;
      parts.x = parts.sums + kGroup * rows_ * kPanel;
      multiply(unit, parts);
    });
  }

 private:
  static constexpr bool kWidens = kIsFloat<Number> && sizeof(T) != sizeof(float);
  static constexpr int64_t kNumbers = kIsFloat<Number> ? 1 : 2;  // of an element that is multiplied
  static constexpr int64_t kWords = 128;                         // of a slice: short sums round less
  static constexpr int64_t kDepth = kWords * kNumbers;           // features of it
  static constexpr int64_t kMaxRows = kWidens ? 252 : 504;       // of a unit; sums, and x if widened, take 129 KB each
  static constexpr int64_t kMinRows = 96;                        // of a unit, below which transposing the weights shows
  // Panels of a unit: widening x once for each of AVX2's narrow ones took 10 % of the time.
  static constexpr int64_t kGroup = kWidens && kPanel < 64 ? 64 / kPanel : 1;

  // Output columns from `first` on, and rows [row, row + rows).
  struct Unit {
    int64_t first, row, rows;
  };

  // One thread's memory. Every part begins at a whole vector.
  struct Scratch {
    Number* weight;  // [kWords, kPanel]
    float* bias;     // [kGroup, kPanel]
    float* sums;     // [kGroup, rows, kPanel]
    float* x;        // [rows, kDepth], for rows that are not float32
  };

  const T* weight() const { return static_cast<const T*>(args_.weight); }

  int64_t panels(const Unit& unit) const {
    return min_of(kGroup, ceil_div(layer_.columns() - unit.first, Layer::kColumns));
  }

  void multiply(const Unit& unit, const Scratch& scratch) const {
    for (int64_t p = 0; p < panels(unit); ++p) pack_bias(unit.first + p * Layer::kColumns, scratch.bias + p * kPanel);
    if (args_.in_features == 0) return write_bias(unit, scratch);
    for (int64_t k = 0; k < args_.in_features; k += kDepth) {
      const int64_t depth = min_of(kDepth, args_.in_features - k);
      const T* x = static_cast<const T*>(args_.x) + unit.row * args_.x_stride + k;
      if constexpr (kWidens) {
        for (int64_t r = 0; r < unit.rows; ++r) copy_row(scratch.x + r * kDepth, x + r * args_.x_stride, depth);
      }
      for (int64_t p = 0; p < panels(unit); ++p) {
        const int64_t first = unit.first + p * Layer::kColumns;
        pack_weight(first, k, depth, scratch.weight);
        float* sums = scratch.sums + p * rows_ * kPanel;
        const float* bias = k + depth == args_.in_features ? scratch.bias + p * kPanel : nullptr;
        if constexpr (kWidens) {
          multiply_slice(unit, first, k, depth, scratch.x, kDepth, scratch.weight, sums, bias);
        } else {
          const auto* words = reinterpret_cast<const Number*>(x);
          multiply_slice(unit, first, k, depth, words, args_.x_stride / kNumbers, scratch.weight, sums, bias);
        }
      }
    }
  }

  // The result of no features.
  void write_bias(const Unit& unit, const Scratch& scratch) const {
    for (int64_t i = 0; i < rows_ * kPanel; ++i) scratch.sums[i] = 0.0f;
    for (int64_t p = 0; p < panels(unit); ++p) {
      layer_.write(unit.row, unit.rows, unit.first + p * Layer::kColumns, scratch.sums, scratch.bias + p * kPanel);
    }
  }

  // Features [k, k + depth) of a panel; missing columns are zero.
  void pack_weight(int64_t first, int64_t k, int64_t depth, Number* to) const {
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      const WeightRows rows = layer_.weight_rows(first, c);
      const T* from = weight() + rows.first * args_.weight_stride + k;
      if constexpr (kIsFloat<Number>) {
        transpose_rows(to + c, kPanel, from, args_.weight_stride, rows.count, depth);
      } else {
        transpose_words(to + c, kPanel, from, args_.weight_stride, rows.count, depth);
      }
    }
  }

  void pack_bias(int64_t first, float* to) const {
    const T* bias = static_cast<const T*>(args_.bias);
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      const WeightRows rows = layer_.weight_rows(first, c);
      store(to + c, bias == nullptr ? Vec{} : load_first(bias + rows.first, rows.count));
    }
  }

  // sums (+)= x W^T over features [k, k + depth); fetches the same panel's weights of the next slice. With `bias`, that of
  // the last slice, what the layer makes of the sums is written while they are in the L1 cache.
  void multiply_slice(const Unit& unit, int64_t first, int64_t k, int64_t depth, const Number* x, int64_t x_stride,
                      const Number* packed, float* sums, const float* bias) const {
    const int64_t after = min_of(kDepth, args_.in_features - k - depth), calls = ceil_div(unit.rows, kTileRows);
    const int64_t words = depth / kNumbers;
    Prefetcher next[Layer::kParts];
    for (int part = 0; part < Layer::kParts; ++part) {
      const int64_t row = layer_.weight_rows(first, part * Layer::kColumns).first;
      next[part] = Prefetcher(weight() + row * args_.weight_stride + k + depth, args_.weight_stride * sizeof(T),
                              min_of(Layer::kColumns, layer_.columns() - first), after * sizeof(T), calls);
    }
    for (int64_t r = 0; r < unit.rows; r += kTileRows) {
      for (Prefetcher& part : next) part.fetch();
      const int64_t rows = min_of(kTileRows, unit.rows - r);
      multiply_rows(rows, x + r * x_stride, x_stride, packed, words, sums + r * kPanel, kPanel, k > 0);
      if (bias != nullptr) layer_.write(unit.row + r, rows, first, sums + r * kPanel, bias);
    }
  }

  const Layer& layer_;
  decltype(Layer::args) args_;
  int64_t groups_, blocks_, rows_;  // of panels, of rows, rows of a block
};

// The product of a layer whose memory holds T.
template <typename T, typename Layer>
void multiply_panels(const Layer& layer) {
#if defined(GAFEXT_HAS_PAIRS)
  if constexpr (kIsBFloat16<T>) {
    if (layer.args.in_features % 2 == 0 && layer.args.x_stride % 2 == 0 && multiplies_pairs()) {
      return PanelProduct<T, Layer, uint32_t>(layer).run();
    }
  }
#endif
  PanelProduct<T, Layer>(layer).run();
}

}  // namespace
}  // namespace gafext::GAFEXT_ISA
