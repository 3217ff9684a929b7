#include "linear.h"

#include "../cpu/dispatch.h"
#include "../projection.h"

namespace gafext {

// False where tiles do not take the numbers; `out` is then unfinished.
GAFEXT_CPU_KERNEL(bool, linear, const LinearArgs& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) { m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"); }

LinearArgs check_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "linear";
  require(weight.dim() == 2, op, ": weight must have shape (out_features, in_features), got ", shape_of(weight));
  check_projection(op, x, weight, bias);

  LinearArgs args{};
  args.dtype = check_dtype(op, x);
  args.rows = row_count(x), args.in_features = weight.size(1), args.out_features = weight.size(0);
  return args;
}

Tensor linear_on_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const LinearArgs args = check_linear(x, weight, bias);
  bool done = false;
  const Tensor out = project(args, x, weight, bias, args.out_features,
                             [&](const LinearArgs& complete) { done = cpu::linear(complete); });
  return done ? out : aten_linear(x, weight, bias);
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) { m.impl("linear", TORCH_BOX(&linear_on_cpu)); }

}  // namespace
}  // namespace gafext
