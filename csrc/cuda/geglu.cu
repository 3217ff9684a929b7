// The gate of GEGLU, value * gelu(gate); its projection is aten::linear, that is cuBLAS, called by csrc/ops/geglu.cpp.
//
// Mapping   One pack of 16 bytes of the output per thread, from two of the projection; single elements where the rows
//           or their halves are not aligned. 2048 threads per multiprocessor, and so 64 KB of loads in flight.
// Shared    None.
// FLOPs     About 25 per element, for erf.
// Bytes     2 elements read and 1 written: 31.5 MB in half precision at (rows, inner) = (4096, 1280), 9.4 us at the
//           3.35 TB/s of an H100. A multiprocessor's share of that, 14 bytes per clock, leaves time for 440
//           instructions per pack of a warp; counted in the SASS are 225.
#include "../ops/geglu.h"
#include "common.cuh"

namespace gafext {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// g/2 (1 + erf(g / sqrt 2)) = g cdf(g), cdf(-|g|) = exp(-g^2/2) t P(t), t = 1 / (1 + 0.26 |g|). P was fitted to the
// ratio for the least relative error, 3e-8, which erff would not have after 1 + erf; and erff takes twice the
// instructions. Infinity gives infinity, and -infinity NaN, as the formula does.
__device__ inline float gelu(float g) {
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
  const float tail = p * t * exp2_approximate(g * g * (-0.5f * kLog2E));
  return g * (g > 0.0f ? 1.0f - tail : tail);
}

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

template <typename T, int kSize>
cudaError_t launch_gate(const GegluGateArgs& args, cudaStream_t stream) {
  const int64_t packs = args.rows * (args.inner / kSize);
  if (packs > UINT32_MAX - kThreads) return cudaErrorInvalidConfiguration;
  return launch(geglu_gate_kernel<T, kSize>, (packs + kThreads - 1) / kThreads, kThreads, 0, stream, args,
                static_cast<uint32_t>(packs));
}

}  // namespace
}  // namespace cuda

cudaError_t geglu_gate_cuda(const GegluGateArgs& args, cudaStream_t stream) {
  using namespace cuda;
  const bool aligned = takes_packs(args.projected, args.projected_stride | args.inner, args.dtype) &&
                       takes_packs(args.out, args.inner, args.dtype);
  return with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    return aligned ? launch_gate<T, kPackSize<T>>(args, stream) : launch_gate<T, 1>(args, stream);
  });
}

}  // namespace gafext
