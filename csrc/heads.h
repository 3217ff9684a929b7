// What the attention operations share: tensors of (batch, heads, length, head_dim).
#pragma once

#include <cmath>

#include "tensors.h"

namespace gafext {

inline void check_heads_shape(const char* op, const Named& named) {
  require(named.tensor.dim() == 4, op, ": ", named.name, " must have shape (batch, heads, length, head_dim), got ",
          shape_of(named.tensor));
}

// What the kernels cannot serve. unsupported_reasons() gives the same reasons, for which the Python functions fall back
// to PyTorch before they call this.
inline DType check_supported_heads(const char* op, const Named& query, const Named& key, const Named& value,
                                   int64_t max_head_dim) {
  const DType dtype = check_dtype(op, query.tensor);
  const int64_t head_dim = query.tensor.size(3);
  require(head_dim >= 1 && head_dim <= max_head_dim, op, ": head_dim must be in 1..", max_head_dim, ", got ", head_dim);
  for (const Named* named : {&query, &key, &value}) {
    require(head_dim == 1 || named->tensor.stride(3) == 1, op, ": the last stride of ", named->name, " must be 1, got ",
            named->tensor.stride(3));
  }
  return dtype;
}

// 0 for a dimension of size 1, whose stride may be anything and must not decide how the others are aligned.
inline HeadStrides head_strides(const Tensor& tensor) {
  const auto stride = [&](int64_t dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); };
  return {stride(0), stride(1), stride(2)};
}

template <typename Args>
void set_inputs(Args& args, const Tensor& query, const Tensor& key, const Tensor& value, std::optional<double> scale) {
  args.query = query.const_data_ptr(), args.key = key.const_data_ptr(), args.value = value.const_data_ptr();
  args.query_stride = head_strides(query), args.key_stride = head_strides(key);
  args.value_stride = head_strides(value);
  args.heads = query.size(1), args.head_dim = query.size(3);
  args.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(args.head_dim)));
}

// Uninitialised and like the query, in the memory of (batch, length, heads, head_dim), so that the caller's transpose
// and reshape to (batch, length, heads * head_dim) are free.
inline Tensor empty_heads(const Tensor& query) {
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2), dim = query.size(3);
  const int64_t row = at_least_one(heads) * at_least_one(dim);
  return empty_strided(query, {batch, heads, length, dim}, {at_least_one(length) * row, at_least_one(dim), row, 1});
}

// The result of the kernel with these arguments.
template <typename Args>
Tensor make_output(Args& args, const Tensor& query) {
  Tensor out = empty_heads(query);
  args.out = out.mutable_data_ptr();
  args.out_stride = head_strides(out);
  return out;
}

}  // namespace gafext
