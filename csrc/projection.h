// What linear and geglu share: projections of the last dimension of x.
#pragma once

#include <vector>

#include "tensors.h"

namespace gafext {

inline void check_projection(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  require(x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), op, ": x must have shape (..., ", weight.size(1),
          ") to go with weight ", shape_of(weight), ", got ", shape_of(x));
  check_weight_and_bias(op, x, weight, bias);
}

// The number of rows, when the tensor is seen as (rows, columns).
inline int64_t row_count(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

// From row to row, when the tensor is seen as (rows, columns) with contiguous columns; none if that takes a copy.
inline std::optional<int64_t> row_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t expected = 0;  // of the next dimension outwards
  for (int64_t i = last - 1; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (stride && tensor.stride(i) != expected) return std::nullopt;
    if (!stride) stride = tensor.stride(i);
    expected = tensor.stride(i) * tensor.size(i);
  }
  return stride.value_or(tensor.size(last));
}

// The tensor as (rows, columns) with contiguous columns, copied only if that takes a copy.
struct Matrix {
  Tensor tensor;
  int64_t stride;

  explicit Matrix(const Tensor& from) : tensor(from) {
    std::optional<int64_t> found = row_stride(from);
    if (!found) tensor = torch::stable::contiguous(from), found = row_stride(tensor);
    stride = found.value_or(tensor.size(tensor.dim() - 1));  // an empty one is contiguous with any strides
  }
};

// Uninitialised, of the shape of x with `features` for its last dimension.
inline Tensor empty_projection(const Tensor& x, int64_t features) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(features);
  return torch::stable::new_empty(x, sizes);
}

// Calls kernel(args) with the tensors' memory in `args`, and returns its output of `features` columns.
template <typename Args, typename Kernel>
Tensor project(Args args, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, int64_t features,
               const Kernel& kernel) {
  const Matrix rows(x), columns(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  Tensor out = empty_projection(x, features);
  args.x = static_cast<decltype(args.x)>(rows.tensor.const_data_ptr());
  args.weight = static_cast<decltype(args.weight)>(columns.tensor.const_data_ptr());
  args.bias = bias ? static_cast<decltype(args.bias)>(bias->const_data_ptr()) : nullptr;
  args.out = static_cast<decltype(args.out)>(out.mutable_data_ptr());
  args.x_stride = rows.stride, args.weight_stride = columns.stride;
  kernel(args);
  return out;
}

// In the tensors' dtype, also where autocast is on: it casts the inputs of aten::linear, not those of its out overload.
inline Tensor aten_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  Tensor out = empty_projection(x, weight.size(0));
  const auto as_rows = [&](const char* op, const Tensor& tensor) {
    return call_aten(op, tensor, std::vector<int64_t>{row_count(tensor), tensor.size(tensor.dim() - 1)});
  };
  call_aten_overload("aten::linear", "out", as_rows("aten::reshape", x), weight, bias, as_rows("aten::view", out));
  return out;
}

}  // namespace gafext
