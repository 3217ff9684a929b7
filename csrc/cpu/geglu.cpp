// The projection of GEGLU with the gate in its epilogue: the (rows, 2 inner) intermediate never reaches memory.
//
// The product is that of panels.h; a panel is kColumns value columns beside their kColumns gate columns, and in the end
// out = value * gelu(gate).
#include "../ops/geglu.h"

#include "amx/geglu.h"
#include "panels.h"

namespace gafext::GAFEXT_ISA {
namespace {

constexpr int64_t kGateFloats = 16384;  // of the result, that a thread takes at a time where the projection is given

// Elements ahead that are prefetched there: 12 to 16% faster with memory that no cache holds, 2 to 5% with memory that
// one does.
constexpr int64_t kGateAhead = 128;

template <typename T>
struct GatedPanels {
  static constexpr int64_t kColumns = kPanel / 2;  // output columns of a panel
  static constexpr int kParts = 2;                 // of a panel, in the weight's memory

  const GegluArgs& args;

  int64_t columns() const { return args.inner; }

  // What lanes [c, c + kLanes) hold of the panel that begins with output column `first`.
  WeightRows weight_rows(int64_t first, int64_t c) const {
    const int64_t column = first + c % kColumns;
    return {(c < kColumns ? 0 : args.inner) + column, max_of(0, min_of(kLanes, args.inner - column))};
  }

  void write(int64_t row, int64_t rows, int64_t first, const float* sums, const float* bias) const {
    const int64_t columns = min_of(kColumns, args.inner - first);
    for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
      T* out = static_cast<T*>(args.out) + (row + r) * args.inner + first;
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Vec gate = load(sums + c + kColumns) + load(bias + c + kColumns);
        const Vec gated = (load(sums + c) + load(bias + c)) * gelu_of(gate);
        columns - c >= kLanes ? store(out + c, gated) : store_first(out + c, gated, columns - c);
      }
    }
  }
};

// gelu(g) = g cdf(g) and its slope, cdf(g) + g pdf(g).
struct GeluAndSlope {
  Vec gelu, slope;

  GAFEXT_INLINE explicit GeluAndSlope(Vec gate) {
    constexpr float kPdfAtZero = 0.39894228f;  // 1 / sqrt(2 pi)
    const Vec tail = normal_tail(gate < 0.0f ? -gate : gate);
    const Vec cdf = gate > 0.0f ? 1.0f - tail : tail;
    gelu = gate * cdf;
    slope = cdf + gate * (kPdfAtZero * exp2_of(gate * gate * (-0.5f * kLog2E)));
  }
};

}  // namespace

void geglu(const GegluArgs& args) {
  if (args.rows * args.inner == 0) return;
#if defined(__AMX_BF16__)
  bool done = false;
  with_element_type(args.dtype, [&](auto element) { done = geglu_on_tiles<decltype(element)>(args); });
  if (done) return;
#endif
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    multiply_panels<T>(GatedPanels<T>{args});
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

void geglu_gate_backward(const GegluGateBackwardArgs& args) {
  const int64_t block = max_of(1, kGateFloats / max_of(args.inner, 1)), blocks = ceil_div(args.rows, block);
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(args.inner == 0 ? 0 : blocks, [&](int64_t, int64_t unit) {
      for (int64_t r = unit * block; r < min_of(args.rows, (unit + 1) * block); ++r) {
        const T *value = static_cast<const T*>(args.projected) + r * args.projected_stride, *gate = value + args.inner;
        const T* grad = static_cast<const T*>(args.grad) + r * args.grad_stride;
        T *grad_value = static_cast<T*>(args.out) + r * 2 * args.inner, *grad_gate = grad_value + args.inner;
        int64_t c = 0;
        for (; c + kLanes <= args.inner; c += kLanes) {
          __builtin_prefetch(value + c + kGateAhead);
          __builtin_prefetch(gate + c + kGateAhead);
          __builtin_prefetch(grad + c + kGateAhead);
          prefetch_to_write(grad_value + c + kGateAhead);
          prefetch_to_write(grad_gate + c + kGateAhead);
          const GeluAndSlope at(load(gate + c));
          store(grad_value + c, load(grad + c) * at.gelu);
          store(grad_gate + c, load(grad + c) * load(value + c) * at.slope);
        }
        if (const int64_t rest = args.inner - c; rest > 0) {
          const GeluAndSlope at(load_first(gate + c, rest));
          const Vec factor = load_first(grad + c, rest);
          store_first(grad_value + c, factor * at.gelu, rest);
          store_first(grad_gate + c, factor * load_first(value + c, rest) * at.slope, rest);
        }
      }
    });
  });
}

}  // namespace gafext::GAFEXT_ISA
