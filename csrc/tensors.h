// What the operations do with torch's tensors, through LibTorch's stable ABI alone (torch/csrc/stable,
// torch/headeronly), so that one module runs on every torch >= 2.11, with or without CUDA.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "checks.h"

namespace gafext {

// The stride over a dimension of this size, as torch.empty counts empty dimensions.
inline int64_t at_least_one(int64_t size) { return std::max<int64_t>(size, 1); }

// Uninitialised, like `like`, of the first `dims` sizes and strides; torch::stable::new_empty takes no strides.
inline Tensor empty_strided(const Tensor& like, const std::array<int64_t, 4>& sizes,
                            const std::array<int64_t, 4>& strides, int64_t dims = 4) {
  int32_t dtype, device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

// An overload of an operation of PyTorch's, through the dispatcher.
template <typename... Args>
Tensor call_aten_overload(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename... Args>
Tensor call_aten(const char* op, const Args&... args) {
  return call_aten_overload(op, "", args...);
}

#ifdef GAFEXT_WITH_CUDA

// In libtorch_cuda; weak, so that the module also loads beside a torch without CUDA, where nothing calls it.
// (torch::stable::accelerator::Stream gives the native stream from 2.13 on only.)
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

inline cudaStream_t current_stream(const Tensor& tensor) {
  require(&aoti_torch_get_current_cuda_stream != nullptr, "gafext: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* op, const char* name, const Tensor& tensor) {
  require(error == cudaSuccess, op, ": the CUDA kernel failed to launch: ", cudaGetErrorString(error), " (", name, " ",
          shape_of(tensor), " ", dtype_name(tensor), ")");
}

#endif

}  // namespace gafext
