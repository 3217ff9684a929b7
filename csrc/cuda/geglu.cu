// The gate of GEGLU; its projection is aten::linear, that is cuBLAS, called by bindings.cpp.
//
// Mapping   a thread an output element, a grid of blocks of 256 that strides over the rest.
// Shared    none.
// FLOPs     about 30 an element, for erf.
// Bytes     2 elements read and 1 written: 31.5 MB in half precision at (rows, inner) = (4096, 1280), 9.4 us at the
//           3.35 TB/s of an H100.
#include "common.cuh"

namespace gafext {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;  // an H100's multiprocessors hold 8 blocks of 256 threads: two waves

template <typename T>
__global__ void geglu_gate_kernel(const GegluGateArgs args) {
  const T* projected = static_cast<const T*>(args.projected);
  T* out = static_cast<T*>(args.out);
  const int64_t count = args.rows * args.inner, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t row = i / args.inner, column = i % args.inner;
    const T* pair = projected + row * args.projected_stride + column;
    const float value = to_float(pair[0]), gate = to_float(pair[args.inner]);
    out[i] = from_float<T>(value * (0.5f * gate * (1.0f + erff(gate * 0.70710678f))));
  }
}

}  // namespace
}  // namespace cuda

cudaError_t geglu_gate_cuda(const GegluGateArgs& args, cudaStream_t stream) {
  using namespace cuda;
  const int64_t blocks = (args.rows * args.inner + kThreads - 1) / kThreads;
  return with_element_type(args.dtype, [&](auto element) {
    return launch(geglu_gate_kernel<decltype(element)>, blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, 0, stream,
                  args);
  });
}

}  // namespace gafext
