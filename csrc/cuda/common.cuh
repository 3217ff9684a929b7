// What the CUDA kernels share: element types, sums over a warp, the launch.
#pragma once

#include <cstdint>

#include "../ops.h"
#include "device.cuh"

namespace gafext::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896341f;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Over the 32 lanes of a warp; every lane gets the result.
__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

template <typename T>
__device__ const T* row_of(const void* base, const HeadStrides& stride, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(base) + batch * stride.batch + head * stride.head + row * stride.row;
}

// body(T()) with the element type that `dtype` names.
template <typename Body>
cudaError_t with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kFloat16:
      return body(__half());
    case DType::kBFloat16:
      return body(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

// body(Chunks<n>()) with the number of 32-wide chunks that holds head_dim <= 256: 2, 4 or 8.
template <int N>
struct Chunks {
  static constexpr int value = N;
};
template <typename Body>
cudaError_t with_chunks(int64_t head_dim, const Body& body) {
  if (head_dim <= 2 * kWarp) return body(Chunks<2>());
  if (head_dim <= 4 * kWarp) return body(Chunks<4>());
  return body(Chunks<8>());
}

// kernel<<<blocks, threads, shared_bytes, stream>>>(args...), blocks along x alone, whose limit is 2^31 - 1 and not
// 65535. Nothing for 0 blocks.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {  // what a kernel may have without asking
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace gafext::cuda
