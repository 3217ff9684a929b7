#include "linear_int8.h"

#include "../cpu/dispatch.h"
#include "../projection.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, linear_int8, const LinearInt8Args& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) {
  m.def("linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor");
}

void check_linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias) {
  const char* op = "linear_int8";
  require(weight.dim() == 2, op, ": weight must have shape (out_features, in_features), got ", shape_of(weight));
  require(weight.scalar_type() == ScalarType::Char, op, ": weight must have dtype int8, got ", dtype_name(weight));
  require(weight.device() == x.device(), op, ": weight must be on the device of x");
  require(x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), op, ": x must have shape (..., ", weight.size(1),
          ") to go with weight ", shape_of(weight), ", got ", shape_of(x));
  check_per_channel(op, x, weight, scale, bias);
  check_float32(op, x);
  require(weight.size(1) <= kMaxInt8Features, op, ": in_features must be at most ", kMaxInt8Features, ", got ",
          weight.size(1));
}

Tensor linear_int8_on_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale,
                          const std::optional<Tensor>& bias) {
  check_linear_int8(x, weight, scale, bias);
  LinearInt8Args args{};
  args.rows = row_count(x), args.in_features = weight.size(1), args.out_features = weight.size(0);
  const Tensor scales = torch::stable::contiguous(scale);
  args.scale = static_cast<const float*>(scales.const_data_ptr());
  return project(args, x, weight, bias, args.out_features,
                 [](const LinearInt8Args& complete) { cpu::linear_int8(complete); });
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) { m.impl("linear_int8", TORCH_BOX(&linear_int8_on_cpu)); }

}  // namespace
}  // namespace gafext
