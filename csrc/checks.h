// What the operations check of their tensors. The messages are those of the Python functions.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "types.h"

namespace gafext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws the joined parts when the condition does not hold. (STD_TORCH_CHECK puts file and line before the message.)
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// "(2, 3, 4)", as Python writes a tuple. Formatted only when a check fails: formatting always took 3 us of a call.
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
  using enum ScalarType;
  constexpr std::pair<ScalarType, const char*> kNames[] = {
      {Float, "float32"}, {Half, "float16"}, {BFloat16, "bfloat16"}, {Double, "float64"},
      {Char, "int8"},     {Int, "int32"},    {Long, "int64"},        {Bool, "bool"}};
  for (const auto& [type, name] : kNames) {
    if (tensor.scalar_type() == type) return name;
  }
  return torch::headeronly::toString(tensor.scalar_type());
}

inline DType check_dtype(const char* op, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op,
          ": dtype must be float32, float16 or bfloat16, got ", dtype_name(tensor));
  return type == ScalarType::Float ? DType::kFloat32 : type == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
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

inline void check_weight_and_bias(const char* op, const Tensor& x, const Tensor& weight,
                                  const std::optional<Tensor>& bias) {
  if (bias) {
    require(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": bias must have shape (", weight.size(0),
            ",) to go with weight ", shape_of(weight), ", got ", shape_of(*bias));
  }
  check_same_kind(op, {"x", x}, {"weight", weight});
  if (bias) check_same_kind(op, {"x", x}, {"bias", *bias});
}

// Vectors with a number for each output of a weight of 8 bits. The scale is float32, of float64 x float64.
inline void check_per_channel(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                              const std::optional<Tensor>& bias) {
  const auto check = [&](const Named& vector) {
    require(vector.tensor.dim() == 1 && vector.tensor.size(0) == weight.size(0), op, ": ", vector.name,
            " must have shape (", weight.size(0), ",) to go with weight ", shape_of(weight), ", got ",
            shape_of(vector.tensor));
    require(vector.tensor.device() == x.device(), op, ": ", vector.name, " must be on the device of x");
  };
  check({"scale", scale});
  const ScalarType wanted = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  require(scale.scalar_type() == wanted, op, ": scale must have dtype ",
          wanted == ScalarType::Double ? "float64" : "float32", ", got ", dtype_name(scale));
  if (!bias) return;
  check({"bias", *bias});
  check_same_kind(op, {"x", x}, {"bias", *bias});
}

inline void check_equal_shape(const char* op, const Named& first, const Named& other) {
  bool equal = first.tensor.dim() == other.tensor.dim();
  for (int64_t i = 0; equal && i < first.tensor.dim(); ++i) equal = first.tensor.size(i) == other.tensor.size(i);
  require(equal, op, ": ", other.name, " must have the shape of ", first.name, ", ", shape_of(first.tensor), ", got ",
          shape_of(other.tensor));
}

inline void check_channels_last(const char* op, const Named& image) {
  require(image.tensor.size(1) == 1 || image.tensor.stride(1) == 1, op, ": ", image.name,
          " must be channels-last, got a stride of ", image.tensor.stride(1), " from channel to channel");
}

}  // namespace gafext
