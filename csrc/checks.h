// What the operations ask of their tensors, in the words that gafext/ops/*.py uses too.
//
// Every device's operation calls check_<op>() first. It throws std::runtime_error, or returns the kernel's arguments
// with everything in place but the output.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops.h"

namespace gafext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws the joined parts when the condition does not hold. (STD_TORCH_CHECK puts file and line before the words.)
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// "(2, 3, 4)", as Python writes a tuple. Written only when a check fails: made before, they took 3 us of a call.
struct ShapeOf {
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& text, const ShapeOf& shape) {
  text << "(";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) text << (i ? ", " : "") << shape.tensor.size(i);
  return text << (shape.tensor.dim() == 1 ? ",)" : ")");
}
inline ShapeOf shape_of(const Tensor& tensor) { return {tensor}; }

// "float32", as Python names it. The rarer ones keep their C++ name.
inline const char* dtype_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(tensor.scalar_type());
  }
}

inline DType check_dtype(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      throw std::runtime_error(std::string(op) + ": dtype must be float32, float16 or bfloat16, got " +
                               dtype_name(tensor));
  }
}

// The other tensors have the dtype of the first and lie on its device.
struct Named {
  const char* name;
  const Tensor& tensor;
};
inline void check_same_kind(const char* op, const Named& first, const Named& other) {
  require(other.tensor.scalar_type() == first.tensor.scalar_type(), op, ": ", other.name, " must have the dtype of ",
          first.name, ", ", dtype_name(first.tensor), ", got ", dtype_name(other.tensor));
  require(other.tensor.device() == first.tensor.device(), op, ": ", other.name, " must be on the device of ",
          first.name);
}

inline void check_heads_shape(const char* op, const Named& named) {
  require(named.tensor.dim() == 4, op, ": ", named.name, " must have shape (batch, heads, length, head_dim), got ",
          shape_of(named.tensor));
}

inline void check_equal_shape(const char* op, const Named& first, const Named& other) {
  bool equal = first.tensor.dim() == other.tensor.dim();
  for (int64_t i = 0; equal && i < first.tensor.dim(); ++i) equal = first.tensor.size(i) == other.tensor.size(i);
  require(equal, op, ": ", other.name, " must have the shape of ", first.name, ", ", shape_of(first.tensor), ", got ",
          shape_of(other.tensor));
}

// What the kernels cannot serve, and unsupported_reasons() names: the Python functions go to PyTorch before this.
inline DType check_supported_heads(const char* op, const Named& query, const Named& key, const Named& value,
                                   int64_t max_head_dim = kMaxHeadDim) {
  const DType dtype = check_dtype(op, query.tensor);
  const int64_t head_dim = query.tensor.size(3);
  require(head_dim >= 1 && head_dim <= max_head_dim, op, ": head_dim must be in 1..", max_head_dim, ", got ", head_dim);
  for (const Named* named : {&query, &key, &value}) {
    require(head_dim == 1 || named->tensor.stride(3) == 1, op, ": the last stride of ", named->name, " must be 1, got ",
            named->tensor.stride(3));
  }
  return dtype;
}

inline HeadStrides head_strides(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

inline float scale_or_default(std::optional<double> scale, int64_t head_dim) {
  return static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(head_dim)));
}

inline int64_t max_flash_head_dim(const Tensor& query) {
  const bool wide = !query.is_cuda() || (query.scalar_type() != ScalarType::Float && query.size(3) % 8 == 0);
  return wide ? kMaxWideHeadDim : kMaxHeadDim;
}

inline FlashAttentionArgs check_flash_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                std::optional<double> scale, bool is_causal) {
  const char* op = "flash_attention";
  const Named q{"query", query}, k{"key", key}, v{"value", value};
  for (const Named* named : {&q, &k, &v}) check_heads_shape(op, *named);
  require(key.size(0) == query.size(0) && key.size(1) == query.size(1) && key.size(3) == query.size(3), op,
          ": key must have the batch, heads and head_dim of query, ", shape_of(query), ", got ", shape_of(key));
  check_equal_shape(op, k, v);
  check_same_kind(op, q, k);
  check_same_kind(op, q, v);

  FlashAttentionArgs args{};
  args.dtype = check_supported_heads(op, q, k, v, max_flash_head_dim(query));
  args.query = query.const_data_ptr(), args.key = key.const_data_ptr(), args.value = value.const_data_ptr();
  args.batch = query.size(0), args.heads = query.size(1), args.head_dim = query.size(3);
  args.query_length = query.size(2), args.key_length = key.size(2);
  args.query_stride = head_strides(query), args.key_stride = head_strides(key);
  args.value_stride = head_strides(value);
  args.scale = scale_or_default(scale, args.head_dim);
  args.is_causal = is_causal;
  return args;
}

inline CrossViewAttentionArgs check_cross_view_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                         int64_t num_views, std::optional<double> scale) {
  const char* op = "cross_view_attention";
  const Named q{"query", query}, k{"key", key}, v{"value", value};
  check_heads_shape(op, q);
  check_equal_shape(op, q, k);
  check_equal_shape(op, q, v);
  require(num_views >= 1, op, ": num_views must be at least 1, got ", num_views);
  require(query.size(0) % num_views == 0, op, ": the batch of query must be a multiple of num_views = ", num_views,
          ", got ", shape_of(query));
  check_same_kind(op, q, k);
  check_same_kind(op, q, v);

  CrossViewAttentionArgs args{};
  args.dtype = check_supported_heads(op, q, k, v);
  require(num_views <= kMaxViews, op, ": num_views must be in 1..", kMaxViews, ", got ", num_views);
  args.query = query.const_data_ptr(), args.key = key.const_data_ptr(), args.value = value.const_data_ptr();
  args.batch = query.size(0) / num_views, args.views = num_views;
  args.heads = query.size(1), args.length = query.size(2), args.head_dim = query.size(3);
  args.query_stride = head_strides(query), args.key_stride = head_strides(key);
  args.value_stride = head_strides(value);
  args.scale = scale_or_default(scale, args.head_dim);
  return args;
}

inline void check_weight_and_bias(const char* op, const Tensor& x, const Tensor& weight,
                                  const std::optional<Tensor>& bias) {
  if (bias) {
    require(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": bias must have shape (", weight.size(0),
            ",) to go with weight ", shape_of(weight), ", got ", shape_of(*bias));
  }
  check_same_kind(op, {"x", x}, {"weight", weight});
  if (bias) check_same_kind(op, {"x", x}, {"bias", *bias});
}

// Sizes and dtype only: the tensors may still need a contiguous copy.
inline GegluArgs check_geglu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "geglu";
  require(weight.dim() == 2 && weight.size(0) % 2 == 0, op, ": weight must have shape (2 * inner, in_features), got ",
          shape_of(weight));
  require(x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), op, ": x must have shape (..., ", weight.size(1),
          ") to go with weight ", shape_of(weight), ", got ", shape_of(x));
  check_weight_and_bias(op, x, weight, bias);

  GegluArgs args{};
  args.dtype = check_dtype(op, x);
  args.in_features = weight.size(1), args.inner = weight.size(0) / 2;
  args.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) args.rows *= x.size(i);
  return args;
}

// Sizes and dtype only, as check_geglu.
inline LinearArgs check_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "linear";
  require(weight.dim() == 2, op, ": weight must have shape (out_features, in_features), got ", shape_of(weight));
  require(x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), op, ": x must have shape (..., ", weight.size(1),
          ") to go with weight ", shape_of(weight), ", got ", shape_of(x));
  check_weight_and_bias(op, x, weight, bias);
  require(x.scalar_type() == ScalarType::Float, op, ": dtype must be float32, got ", dtype_name(x));

  LinearArgs args{};
  args.in_features = weight.size(1), args.out_features = weight.size(0);
  args.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) args.rows *= x.size(i);
  return args;
}

// Sizes and dtype only, as check_geglu.
inline GegluGateArgs check_geglu_gate(const Tensor& projected) {
  const int64_t last = projected.dim() - 1;
  require(last >= 0 && projected.size(last) % 2 == 0, "geglu_gate: projected must have shape (..., 2 * inner), got ",
          shape_of(projected));
  GegluGateArgs args{};
  args.dtype = check_dtype("geglu_gate", projected);
  args.inner = projected.size(last) / 2;
  args.rows = 1;
  for (int64_t i = 0; i < last; ++i) args.rows *= projected.size(i);
  return args;
}

inline GroupNormSiluArgs check_group_norm_silu(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                                               const std::optional<Tensor>& bias, double eps, bool silu) {
  const char* op = "group_norm_silu";
  require(x.dim() == 3 || x.dim() == 4, op,
          ": x must have shape (batch, channels, length) or (batch, channels, height, width), got ", shape_of(x));
  const int64_t channels = x.size(1);
  require(num_groups >= 1 && channels % num_groups == 0, op, ": num_groups must divide the channels of x ", shape_of(x),
          ", got ", num_groups);
  for (const auto& [name, tensor] : {std::pair{"weight", &weight}, std::pair{"bias", &bias}}) {
    if (!*tensor) continue;
    require((*tensor)->dim() == 1 && (*tensor)->size(0) == channels, op, ": ", name, " must have shape (", channels,
            ",) to go with x ", shape_of(x), ", got ", shape_of(**tensor));
    check_same_kind(op, {"x", x}, {name, **tensor});
  }

  GroupNormSiluArgs args{};
  args.dtype = check_dtype(op, x);
  require(channels / num_groups <= kMaxGroupChannels, op, ": a group must have at most ", kMaxGroupChannels,
          " channels, got ", channels / num_groups);
  require(channels == 1 || x.stride(1) == 1, op, ": x must be channels-last, got a stride of ", x.stride(1),
          " from channel to channel");
  const int64_t height = x.dim() == 4 ? x.size(2) : 1, width = x.size(x.dim() - 1);
  args.position_stride = width == 1 ? x.stride(2) : x.stride(x.dim() - 1);
  require(height == 1 || width == 1 || x.stride(2) == width * args.position_stride, op, ": x must have a stride of ",
          width * args.position_stride, " from row to row, got ", x.stride(2));
  args.batch = x.size(0), args.channels = channels, args.positions = height * width, args.groups = num_groups;
  args.image_stride = x.stride(0);
  args.eps = static_cast<float>(eps);
  args.silu = silu;
  return args;
}

inline Conv3x3Args check_conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "conv3x3";
  require(x.dim() == 4, op, ": x must have shape (batch, channels, height, width), got ", shape_of(x));
  require(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3, op,
          ": weight must have shape (out_channels, ", x.size(1), ", 3, 3) to go with x ", shape_of(x), ", got ",
          shape_of(weight));
  check_weight_and_bias(op, x, weight, bias);
  require(x.scalar_type() == ScalarType::Float, op, ": dtype must be float32, got ", dtype_name(x));
  require(x.size(1) >= 1, op, ": channels must be at least 1, got ", shape_of(x));
  require(x.size(1) == 1 || x.stride(1) == 1, op, ": x must be channels-last, got a stride of ", x.stride(1),
          " from channel to channel");

  Conv3x3Args args{};
  args.x = static_cast<const float*>(x.const_data_ptr());
  args.batch = x.size(0), args.in_channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  args.out_channels = weight.size(0);
  args.x_stride = {x.stride(0), x.stride(2), x.stride(3)};
  return args;
}

}  // namespace gafext
