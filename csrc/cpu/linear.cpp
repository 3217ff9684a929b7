// A linear layer, where AMX tiles multiply float32 faster than sgemm.
#include "../ops/linear.h"

#include "amx/linear.h"

namespace gafext::GAFEXT_ISA {
#if defined(__AMX_BF16__)
namespace {

struct PlainColumns {
  const LinearArgs& args;

  int64_t tiles() const { return ceil_div(args.out_features, kBlock); }

  WeightRows weight_rows(int64_t tile, int64_t half) const {
    const int64_t column = tile * kBlock + half * kTileSide;
    return {column, args.out_features - column};
  }

  void write(int64_t row, int64_t rows, int64_t tile, const float* sums) const {
    for (int64_t column = tile * kBlock, end = min_of(column + kBlock, args.out_features); column < end;
         column += kTileSide, sums += kTileSide) {
      const int64_t columns = end - column;
      const Vec bias = args.bias == nullptr ? Vec{} : load_up_to(args.bias + column, columns);
      float* out = args.out + row * args.out_features + column;
      for (int64_t r = 0; r < rows; ++r) {
        const Vec sum = load(sums + r * kBlock) + bias;
        float* to = out + r * args.out_features;
        columns >= kTileSide ? store(to, sum) : store_first(to, sum, columns);
      }
    }
  }
};

}  // namespace

bool linear(const LinearArgs& args) {
  const bool is_empty = args.rows * args.in_features * args.out_features == 0;
  return !is_empty && AmxLinear<float, PlainColumns>(PlainColumns{args}).run();
}

#else

bool linear(const LinearArgs&) { return false; }

#endif
}  // namespace gafext::GAFEXT_ISA
