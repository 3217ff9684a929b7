// What the CUDA kernels share: element types, reductions over a warp, the launch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../types.h"
#include "device.cuh"

namespace gafext::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896341f;

// kSize consecutive elements that move in one access: 16 bytes of them, or a single one where that is not aligned.
template <typename T>
constexpr int kPackSize = 16 / sizeof(T);
template <typename T, int kSize>
struct Pack {
  static_assert(kSize == kPackSize<T>);
  uint4 bits;
};
template <typename T>
struct Pack<T, 1> {
  T bits;
};
// Zeros where !inside.
template <typename T, int kSize>
__device__ inline Pack<T, kSize> load_pack(const T* source, bool inside) {
  if constexpr (kSize == 1) {
    return {inside ? *source : T{}};
  } else {
    return {load_16(source, inside)};
  }
}
template <typename T, int kSize>
__device__ inline void store_pack(T* target, const Pack<T, kSize>& pack) {
  if constexpr (kSize == 1) {
    *target = pack.bits;
  } else {
    store_16(target, pack.bits);
  }
}
// Two elements of 2 bytes in a register, as pack_pair puts them there.
template <typename T>
__device__ inline void pair_to_floats(uint32_t bits, float& first, float& second) {
  T pair[2];
  memcpy(pair, &bits, 4);
  first = static_cast<float>(pair[0]), second = static_cast<float>(pair[1]);
}
template <>
__device__ inline void pair_to_floats<__nv_bfloat16>(uint32_t bits, float& first, float& second) {
  first = __uint_as_float(bits << 16), second = __uint_as_float(bits & 0xffff0000u);
}

template <typename T, int kSize>
__device__ inline void to_floats(const Pack<T, kSize>& pack, float (&x)[kSize]) {
  if constexpr (kSize == 1) {
    x[0] = static_cast<float>(pack.bits);
  } else {
    const uint32_t word[4] = {pack.bits.x, pack.bits.y, pack.bits.z, pack.bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        x[i] = __uint_as_float(word[i]);
      } else {
        pair_to_floats<T>(word[i], x[2 * i], x[2 * i + 1]);
      }
    }
  }
}
template <typename T, int kSize>
__device__ inline Pack<T, kSize> from_floats(const float (&x)[kSize]) {
  if constexpr (kSize == 1) {
    return {static_cast<T>(x[0])};
  } else {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        word[i] = __float_as_uint(x[i]);
      } else {
        word[i] = pack_pair(x[2 * i], x[2 * i + 1], T());
      }
    }
    return {make_uint4(word[0], word[1], word[2], word[3])};
  }
}

// Over the kLanes lanes of a warp that start at a multiple of kLanes; every lane gets the result.
template <int kLanes = kWarp>
__device__ inline float warp_sum(float x) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
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
template <typename T>
__device__ T* row_of(void* base, const HeadStrides& stride, int64_t batch, int64_t head, int64_t row) {
  return const_cast<T*>(row_of<T>(static_cast<const void*>(base), stride, batch, head, row));
}

// Whether rows that lie `stride` elements apart can be read in 16-byte packs.
inline bool takes_packs(const void* base, int64_t stride, DType dtype) {
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * size % 16 == 0;
}

// body(T()) with the element type that `dtype` names.
template <typename Body>
cudaError_t with_element_type(DType dtype, const Body& body) {
  if (dtype == DType::kFloat16) return body(__half());
  if (dtype == DType::kBFloat16) return body(__nv_bfloat16());
  return body(float());
}

template <int N>
using Chunks = std::integral_constant<int, N>;

// body(Chunks<n>()) with the number of 32-wide chunks that holds head_dim <= 256: 2, 4 or 8.
template <typename Body>
cudaError_t with_chunks(int64_t head_dim, const Body& body) {
  if (head_dim <= 2 * kWarp) return body(Chunks<2>());
  if (head_dim <= 4 * kWarp) return body(Chunks<4>());
  return body(Chunks<8>());
}

// Of the current device.
inline cudaError_t device_attribute(int& value, cudaDeviceAttr attribute) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(&value, attribute, device) : error;
}

// Whether the current device's tensor cores multiply this type as mma_16x8x16 does: Turing's only float16, Volta's none.
inline bool multiplies_matrices(DType dtype) {
  int major = 0, minor = 0;
  if (device_attribute(major, cudaDevAttrComputeCapabilityMajor) != cudaSuccess) return false;
  if (device_attribute(minor, cudaDevAttrComputeCapabilityMinor) != cudaSuccess) return false;
  return (dtype == DType::kFloat16 && 10 * major + minor >= 75) || (dtype == DType::kBFloat16 && major >= 8);
}

// kernel<<<blocks, threads, shared_bytes, stream>>>(args...), blocks along x alone, whose limit is 2^31 - 1 and not
// 65535. Nothing for 0 blocks.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {  // the limit without this attribute
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
