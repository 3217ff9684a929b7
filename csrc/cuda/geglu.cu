// The gate of GEGLU, value * gelu(gate), and its gradient; the projection is aten::linear, that is cuBLAS, called by
// csrc/ops/geglu.cpp.
//
// Mapping   One pack of 16 bytes of the output per thread, from two of the projection; single elements where the rows
//           or their halves are not aligned. 2048 threads per multiprocessor, and so 64 KB of loads in flight.
// Shared    None.
// FLOPs     About 25 per element, for erf.
// Bytes     2 elements read and 1 written: 31.5 MB in half precision at (rows, inner) = (4096, 1280), 9.4 us at the
//           3.35 TB/s of an H100. A multiprocessor's share of that, 14 bytes per clock, leaves time for 440
//           instructions per pack of a warp; counted in the SASS are 225. The gradient reads 3 and writes 2: 52.4 MB.
#include "../ops/geglu.h"
#include "common.cuh"

namespace gafext {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// g/2 (1 + erf(g / sqrt 2)) = g cdf(g), cdf(-|g|) = exp(-g^2/2) t P(t), t = 1 / (1 + 0.26 |g|). P was fitted to the
// ratio for the least relative error, 3e-8, which erff would not have after 1 + erf; and erff takes twice the
// instructions. Infinity gives infinity, and -infinity NaN, as the formula does; both gradients there are NaN.
struct Normal {
  float cdf, density;  // at g
};
__device__ inline Normal normal(float g) {
  const float t = reciprocal_approximate(1.0f + 0.26f * fabsf(g));
  float p = 0.030230155f;
  p = p * t - 0.15149377f;
  p = p * t + 0.24873192f;
  p = p * t - 0.14778797f;
  p = p * t + 0.15875788f;
  p = p * t + 0.051965166f;
  p = p * t + 0.10278860f;
  p = p * t + 0.10305098f;
  p = p * t + 0.10375702f;
  const float power = exp2_approximate(g * g * (-0.5f * kLog2E)), tail = p * t * power;
  return {g > 0.0f ? 1.0f - tail : tail, power * 0.398942280f};
}
__device__ inline float gelu(float g) { return g * normal(g).cdf; }

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) geglu_gate_kernel(const GegluGateArgs args, uint32_t packs) {
  const uint32_t pack = blockIdx.x * kThreads + threadIdx.x, packs_of_row = args.inner / kSize;
  if (pack >= packs) return;
  const uint32_t row = pack / packs_of_row, column = pack % packs_of_row * kSize;
  const T* source = static_cast<const T*>(args.projected) + row * args.projected_stride + column;
  const auto value = load_pack<T, kSize>(source, true), gate = load_pack<T, kSize>(source + args.inner, true);
  float x[kSize], g[kSize];
  to_floats(value, x);
  to_floats(gate, g);
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] *= gelu(g[i]);
  store_pack(static_cast<T*>(args.out) + static_cast<int64_t>(pack) * kSize, from_floats<T>(x));
}

// [grad gelu(gate), grad value gelu'(gate)], gelu'(g) = cdf(g) + g density(g): 3 elements read and 2 written.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads)
    geglu_gate_backward_kernel(const GegluGateBackwardArgs args, uint32_t packs) {
  const uint32_t pack = blockIdx.x * kThreads + threadIdx.x, packs_of_row = args.inner / kSize;
  if (pack >= packs) return;
  const uint32_t row = pack / packs_of_row, column = pack % packs_of_row * kSize;
  const T* source = static_cast<const T*>(args.projected) + row * args.projected_stride + column;
  const T* change = static_cast<const T*>(args.grad) + row * args.grad_stride + column;
  const auto value = load_pack<T, kSize>(source, true), gate = load_pack<T, kSize>(source + args.inner, true);
  const auto grad = load_pack<T, kSize>(change, true);
  float x[kSize], g[kSize], dy[kSize];
  to_floats(value, x);
  to_floats(gate, g);
  to_floats(grad, dy);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Normal at = normal(g[i]);
    x[i] *= dy[i] * (at.cdf + g[i] * at.density);
    g[i] *= dy[i] * at.cdf;
  }
  T* out = static_cast<T*>(args.out) + static_cast<int64_t>(row) * 2 * args.inner + column;
  store_pack(out, from_floats<T>(g));
  store_pack(out + args.inner, from_floats<T>(x));
}

// A thread per pack of `size` elements of a row of `inner`.
template <typename Args>
cudaError_t launch_packs(void (*kernel)(Args, uint32_t), int size, const Args& args, cudaStream_t stream) {
  const int64_t packs = args.rows * (args.inner / size);
  if (packs > UINT32_MAX - kThreads) return cudaErrorInvalidConfiguration;
  return launch(kernel, (packs + kThreads - 1) / kThreads, kThreads, 0, stream, args, static_cast<uint32_t>(packs));
}

}  // namespace
}  // namespace cuda

cudaError_t geglu_gate_cuda(const GegluGateArgs& args, cudaStream_t stream) {
  using namespace cuda;
  const bool aligned = takes_packs(args.projected, args.projected_stride | args.inner, args.dtype) &&
                       takes_packs(args.out, args.inner, args.dtype);
  return with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    return aligned ? launch_packs(geglu_gate_kernel<T, kPackSize<T>>, kPackSize<T>, args, stream)
                   : launch_packs(geglu_gate_kernel<T, 1>, 1, args, stream);
  });
}

cudaError_t geglu_gate_backward_cuda(const GegluGateBackwardArgs& args, cudaStream_t stream) {
  using namespace cuda;
  const bool aligned = takes_packs(args.projected, args.projected_stride | args.inner, args.dtype) &&
                       takes_packs(args.grad, args.grad_stride, args.dtype) && takes_packs(args.out, 0, args.dtype);
  return with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    return aligned ? launch_packs(geglu_gate_backward_kernel<T, kPackSize<T>>, kPackSize<T>, args, stream)
                   : launch_packs(geglu_gate_backward_kernel<T, 1>, 1, args, stream);
  });
}

}  // namespace gafext
