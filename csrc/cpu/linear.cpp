// A linear layer by panels (panels.h), for processors that do not multiply half precision, and for those on which it is
// faster than PyTorch's libraries; with AMX on its tiles.
#include "../ops/linear.h"

#include "amx/linear.h"
#include "amx/product.h"
#include "panels.h"

namespace gafext::GAFEXT_ISA {
namespace {

template <typename T>
struct PlainPanels {
  static constexpr int64_t kColumns = kPanel;
  static constexpr int kParts = 1;

  const LinearArgs& args;

  int64_t columns() const { return args.out_features; }

  WeightRows weight_rows(int64_t first, int64_t c) const {
    return {first + c, max_of(0, min_of(kLanes, args.out_features - first - c))};
  }

  void write(int64_t row, int64_t rows, int64_t first, const float* sums, const float* bias) const {
    const int64_t columns = min_of(kColumns, args.out_features - first);
    for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
      T* out = static_cast<T*>(args.out) + (row + r) * args.out_features + first;
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Vec sum = load(sums + c) + load(bias + c);
        columns - c >= kLanes ? store(out + c, sum) : store_first(out + c, sum, columns - c);
      }
    }
  }
};

#if defined(__AMX_BF16__)

template <typename T>
struct PlainColumns {
  const LinearArgs& args;

  int64_t tiles() const { return ceil_div(args.out_features, kBlock); }

  WeightRows weight_rows(int64_t tile, int64_t half) const {
    const int64_t column = tile * kBlock + half * kTileSide;
    return {column, args.out_features - column};
  }

  const T* out(int64_t row, int64_t tile) const {
    return static_cast<const T*>(args.out) + row * args.out_features + tile * kBlock;
  }

  void write(int64_t row, int64_t rows, int64_t tile, const float* sums) const {
    for (int64_t column = tile * kBlock, end = min_of(column + kBlock, args.out_features); column < end;
         column += kTileSide, sums += kTileSide) {
      const int64_t columns = end - column;
      const T* biases = static_cast<const T*>(args.bias);
      const Vec bias = biases == nullptr ? Vec{} : load_up_to(biases + column, columns);
      T* out = static_cast<T*>(args.out) + row * args.out_features + column;
      for (int64_t r = 0; r < rows; ++r) {
        const Vec sum = load(sums + r * kBlock) + bias;
        T* to = out + r * args.out_features;
        columns >= kTileSide ? store_rounded(to, sum) : store_first(to, sum, columns);
      }
    }
  }
};

bool linear_in_float32(const LinearArgs& args) {
  return args.in_features > 0 && AmxLinear<float, PlainColumns<float>>(PlainColumns<float>{args}).run();
}

bool linear_in_bfloat16(const LinearArgs& args) {
  if (args.in_features == 0) return false;
  run_in_bfloat16(PlainColumns<BFloat16>{args});
  return true;
}

#else

bool linear_in_float32(const LinearArgs& args) {
  multiply_panels<float>(PlainPanels<float>{args});
  return true;
}

bool linear_in_bfloat16(const LinearArgs&) { return false; }

#endif

}  // namespace

bool linear(const LinearArgs& args) {
  if (args.rows * args.out_features == 0) return true;
  if (args.dtype == DType::kFloat32) return linear_in_float32(args);
  if (args.dtype == DType::kBFloat16 && linear_in_bfloat16(args)) return true;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    multiply_panels<T>(PlainPanels<T>{args});
  });
  return true;
}

}  // namespace gafext::GAFEXT_ISA
