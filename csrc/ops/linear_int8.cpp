#include "linear_int8.h"

#include "../cpu/dispatch.h"
#include "../projection.h"

namespace gafext {

GAFEXT_CPU_KERNEL(void, linear_int8, const LinearInt8Args& args)

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(gafext, m) {
  m.def("linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? residual=None) -> Tensor");
  m.def("geglu_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor");
}

void check_linear_int8(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                       const std::optional<Tensor>& bias) {
  require(weight.dim() == 2, op, ": weight must have shape (out_features, in_features), got ", shape_of(weight));
  require(weight.scalar_type() == ScalarType::Char, op, ": weight must have dtype int8, got ", dtype_name(weight));
  require(weight.device() == x.device(), op, ": weight must be on the device of x");
  require(x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), op, ": x must have shape (..., ", weight.size(1),
          ") to go with weight ", shape_of(weight), ", got ", shape_of(x));
  check_per_channel(op, x, weight, scale, bias);
  require(weight.size(1) <= kMaxInt8Features, op, ": in_features must be at most ", kMaxInt8Features, ", got ",
          weight.size(1));
}

// Blocks of rows whose rounded form, which scratch memory keeps for good, has at most kMaxRounded numbers.
void run_in_blocks(const LinearInt8Args& args) {
  constexpr int64_t kMaxRounded = int64_t{12} << 20, kFewestRows = 1024;
  const int64_t rows = std::max(kFewestRows, kMaxRounded / at_least_one(args.in_features));
  const int64_t out_stride = args.gated ? args.out_features / 2 : args.out_features;
  const int64_t size = args.dtype == DType::kFloat32 ? 4 : 2;
  LinearInt8Args block = args;
  for (int64_t row = 0; row < args.rows; row += rows) {
    block.rows = std::min(rows, args.rows - row);
    block.x = static_cast<const char*>(args.x) + row * args.x_stride * size;
    block.out = static_cast<char*>(args.out) + row * out_stride * size;
    if (args.residual) block.residual = static_cast<const char*>(args.residual) + row * args.residual_stride * size;
    cpu::linear_int8(block);
  }
}

Tensor apply(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scale,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, bool gated) {
  LinearInt8Args args{};
  args.dtype = check_dtype(op, x);
  args.gated = gated;
  args.rows = row_count(x), args.in_features = weight.size(1), args.out_features = weight.size(0);
  std::optional<Matrix> added;
  if (residual) {
    added.emplace(*residual);
    args.residual = added->tensor.const_data_ptr(), args.residual_stride = added->stride;
  }
  const Tensor scales = torch::stable::contiguous(scale);
  args.scale = static_cast<const float*>(scales.const_data_ptr());
  return project(args, x, weight, bias, gated ? args.out_features / 2 : args.out_features, run_in_blocks);
}

Tensor linear_int8_on_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual) {
  const char* op = "linear_int8";
  check_linear_int8(op, x, weight, scale, bias);
  if (residual) {
    bool matches = residual->dim() == x.dim() && residual->size(x.dim() - 1) == weight.size(0);
    for (int64_t i = 0; matches && i + 1 < x.dim(); ++i) matches = residual->size(i) == x.size(i);
    require(matches, op, ": residual must have shape (..., ", weight.size(0), ") to go with x ", shape_of(x), ", got ",
            shape_of(*residual));
    check_same_kind(op, {"x", x}, {"residual", *residual});
  }
  return apply(op, x, weight, scale, bias, residual, false);
}

Tensor geglu_int8_on_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale,
                         const std::optional<Tensor>& bias) {
  const char* op = "geglu_int8";
  check_linear_int8(op, x, weight, scale, bias);
  require(weight.size(0) % 2 == 0, op, ": weight must have shape (2 * inner, in_features), got ", shape_of(weight));
  return apply(op, x, weight, scale, bias, std::nullopt, true);
}

STABLE_TORCH_LIBRARY_IMPL(gafext, CPU, m) {
  m.impl("linear_int8", TORCH_BOX(&linear_int8_on_cpu));
  m.impl("geglu_int8", TORCH_BOX(&geglu_int8_on_cpu));
}

}  // namespace
}  // namespace gafext
