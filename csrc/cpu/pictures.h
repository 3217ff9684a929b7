// The pictures of a convolution's batch, some at a time.
#pragma once

#include "vector.h"

namespace gafext::GAFEXT_ISA {
namespace {

// The arguments of `count` pictures from `first` on; T is the element type of x.
template <typename T, typename Args>
Args pictures_of(const Args& args, int64_t first, int64_t count) {
  Args part = args;
  part.batch = count;
  part.x = static_cast<const T*>(args.x) + first * args.x_stride.image;
  part.out = static_cast<T*>(args.out) + first * args.height * args.width * args.out_channels;
  if (args.bias != nullptr) part.bias = static_cast<const T*>(args.bias) + first * args.bias_stride;
  if (args.residual != nullptr) {
    part.residual = static_cast<const T*>(args.residual) + first * args.residual_stride.image;
  }
  return part;
}

}  // namespace
}  // namespace gafext::GAFEXT_ISA
