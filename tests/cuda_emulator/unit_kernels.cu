// What the emulator is tested with: see unit_kernels.h.
#include "common.cuh"
#include "unit_kernels.h"

namespace gafext {
namespace cuda {
namespace {

__global__ void shuffle_kernel(const ShuffleArgs args) {
  const int lane = threadIdx.x, value = args.value[lane];
  const unsigned mask = args.mask;
  int result = value;
  if (mask >> lane & 1) {
    if (args.kind == 0) result = __shfl_sync(mask, value, args.argument, args.width);
    if (args.kind == 1) result = __shfl_up_sync(mask, value, args.argument, args.width);
    if (args.kind == 2) result = __shfl_down_sync(mask, value, args.argument, args.width);
    if (args.kind == 3) result = __shfl_xor_sync(mask, value, args.argument, args.width);
  }
  args.out[lane] = result;
}

__global__ void vote_kernel(const VoteArgs args) {
  const int lane = threadIdx.x, value = args.value[lane];
  const unsigned mask = args.mask;
  int* out = args.out + 4 * lane;
  const bool takes_part = mask >> lane & 1;
  out[0] = takes_part ? __ballot_sync(mask, value) : -1;
  out[1] = takes_part ? __any_sync(mask, value) : -1;
  out[2] = takes_part ? __all_sync(mask, value) : -1;
  out[3] = takes_part ? __match_any_sync(mask, value) : -1;
}

__global__ void block_vote_kernel(const BlockVoteArgs args) {
  if (threadIdx.x >= args.live) return;
  const int value = args.value[threadIdx.x];
  int* out = args.out + 3 * threadIdx.x;
  out[0] = __syncthreads_count(value);
  out[1] = __syncthreads_or(value);
  out[2] = __syncthreads_and(value);
}

template <typename T>
__global__ void mma_kernel(const MmaArgs args) {
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = args.a[4 * threadIdx.x + i], c[i] = args.c[4 * threadIdx.x + i];
  for (int i = 0; i < 2; ++i) b[i] = args.b[2 * threadIdx.x + i];
  mma_16x8x16(c, a, b, T());
  for (int i = 0; i < 4; ++i) args.out[4 * threadIdx.x + i] = c[i];
}

__global__ void load_matrices_kernel(const LoadMatricesArgs args) {
  uint4* rows = reinterpret_cast<uint4*>(dynamic_shared_memory());
  copy_16_async(rows + threadIdx.x, args.matrices + 4 * threadIdx.x, true);
  copies_commit();
  copies_wait<0>();
  __syncwarp();
  uint32_t r[4];
  if (args.transposed) {
    load_matrices_transposed(r, rows + threadIdx.x);
  } else {
    load_matrices(r, rows + threadIdx.x);
  }
  for (int i = 0; i < 4; ++i) args.out[4 * threadIdx.x + i] = r[i];
}

__global__ void round_kernel(const RoundArgs args) {
  for (int i = threadIdx.x; i < args.count; i += blockDim.x) {
    const __half half = __float2half_rn(args.value[i]);
    const __nv_bfloat16 brain = __float2bfloat16_rn(args.value[i]);
    args.bits[2 * i] = __half_as_ushort(half), args.bits[2 * i + 1] = __bfloat16_as_ushort(brain);
    args.out[2 * i] = __half2float(half), args.out[2 * i + 1] = __bfloat162float(brain);
  }
}

enum Mistake {
  kNone,
  kReadAfterEnd,
  kReadBeforeBegin,
  kReadInGap,
  kCopyAfterEnd,
  kWriteInput,
  kReadUnwrittenOutput,
  kReadAfterShared,
  kReadUnwrittenShared,
  kRaceOfWrites,
  kRaceOfReadAndWrite,
  kRaceOfLanes,
  kMisalignedVector,
  kMisalignedCopy,
  kCopyTouchedEarly,
  kCopyUnderWay,
  kCopyLeftBehind,
  kLaneLeftOut,
  kLaneReadLeftOut,
  kTwoInstructions,
  kExitedLane,
  kBarrierInBranch,
  kWaitForEver,
  kLoopWithoutEnd,
  kWildPointer,
  kEndlessStack,
  kDivisionByZero,
  kTrap,
  kOrderOfBlocks,
  kUninitialisedLocal,
};

__device__ int recursion(volatile int* depth) {
  volatile int frame[256];
  frame[*depth % 256] = 1;
  *depth = *depth + 1;
  return recursion(depth) + frame[*depth % 256];
}

__global__ void mistake_kernel(const MistakeArgs args) {
  int* shared = reinterpret_cast<int*>(dynamic_shared_memory());  // [threads]
  const int i = threadIdx.x, next = (i + 1) % blockDim.x, n = args.threads;
  const bool last = i == n - 1;
  int result = args.in[i];
  uint32_t r[4] = {};
  shared[i] = result;
  __syncthreads();
  switch (args.kind) {
    case kNone:
      result = shared[next];
      break;
    case kReadAfterEnd:
      result = args.in[last ? 2 * n : i];
      break;
    case kReadBeforeBegin:
      result = args.in[i - 1];
      break;
    case kReadInGap:
      result = args.in[i + 1];
      break;
    case kCopyAfterEnd:
      memcpy(&result, args.in + i + 1, sizeof(int) * (n / 64));
      break;
    case kWriteInput:
      const_cast<int*>(args.in)[i] = 0;
      break;
    case kReadUnwrittenOutput:
      result = args.out[i];
      break;
    case kReadAfterShared:
      result = shared[i + 1];
      break;
    case kReadUnwrittenShared:
      result = shared[n + i % 4];
      break;
    case kRaceOfWrites:
      shared[0] = i;
      break;
    case kRaceOfReadAndWrite:
      result = shared[next];
      shared[i] = 0;
      break;
    case kRaceOfLanes:
      shared[i] = 0;
      result = __shfl_xor_sync(kAllLanes, shared[i ^ 1], 1);
      break;
    case kMisalignedVector:
      result = reinterpret_cast<const uint2*>(args.in + 1)->x;
      break;
    case kMisalignedCopy:
      copy_16_async(shared, args.in + 1, true);
      break;
    case kCopyTouchedEarly:
      if (i == 0) copy_16_async(shared + n, args.in, true);
      __syncthreads();
      result = shared[n];
      break;
    case kCopyUnderWay:  // each thread waits for its own copy alone
      if (i < 1) copy_16_async(shared + n, args.in, true);
      copies_commit();
      copies_wait<0>();
      result = shared[n];
      break;
    case kCopyLeftBehind:
      if (i == 0) copy_16_async(shared + n, args.in, true);
      copies_wait<0>();  // of no group
      break;
    case kLaneLeftOut:
      result = __shfl_xor_sync(0x7fffffffu, result, 1);
      break;
    case kLaneReadLeftOut:
      if (i % kWarp < 16) result = __shfl_sync(0xffffu, result, 16);
      break;
    case kTwoInstructions:
      result = i % 2 ? __ballot_sync(kAllLanes, i) : __shfl_sync(kAllLanes, i, 0);
      break;
    case kExitedLane:
      if (last) return;
      load_matrices(r, shared + i / 4 * 4);
      break;
    case kBarrierInBranch:
      if (i < kWarp) __syncthreads();
      if (i >= kWarp) result = __syncthreads_or(i);
      break;
    case kWaitForEver:
      if (i < 16) result = __shfl_xor_sync(kAllLanes, result, 1);
      __syncthreads();
      break;
    case kLoopWithoutEnd:
      while (i == 5) shared[n] = 0;
      break;
    case kWildPointer:
      result = *reinterpret_cast<const int*>(uintptr_t{4096} + args.in[0]);
      break;
    case kEndlessStack:
      result = recursion(&result);
      break;
    case kDivisionByZero:
      result = n / (args.in[i] - args.in[i]);
      break;
    case kTrap:
      __trap();
    case kOrderOfBlocks:
      break;
    case kUninitialisedLocal: {
      float sum;
      float* behind = &sum;
      asm volatile("" : "+r"(behind)::"memory");
      result = *behind == 0.0f;
      break;
    }
  }
  if (args.kind == kOrderOfBlocks) {
    args.out[i] = blockIdx.x;
  } else if (blockIdx.x == 0) {
    args.out[i] = result;
  }
}

// Partial sums of 256 elements a block, then their sum by one thread.
__global__ void partial_sum_kernel(const SumArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float sum = warp_sum(i < args.count ? args.value[i] : 0.0f);
  if (threadIdx.x % kWarp == 0) static_cast<float*>(args.workspace)[i / kWarp] = sum;
}
__global__ void total_kernel(const SumArgs args) {
  float sum = 0.0f;
  for (int64_t i = 0; i < sum_workspace(args) / 4; ++i) sum += static_cast<const float*>(args.workspace)[i];
  *args.out = sum;
}

}  // namespace
}  // namespace cuda

using namespace cuda;

cudaError_t shuffle_cuda(const ShuffleArgs& args, cudaStream_t stream) {
  return launch(shuffle_kernel, 1, kWarp, 0, stream, args);
}
cudaError_t vote_cuda(const VoteArgs& args, cudaStream_t stream) {
  return launch(vote_kernel, 1, kWarp, 0, stream, args);
}
cudaError_t block_vote_cuda(const BlockVoteArgs& args, cudaStream_t stream) {
  return launch(block_vote_kernel, 1, args.threads, 0, stream, args);
}
cudaError_t mma_cuda(const MmaArgs& args, cudaStream_t stream) {
  return launch(args.dtype == DType::kFloat16 ? mma_kernel<__half> : mma_kernel<__nv_bfloat16>, 1, kWarp, 0, stream,
                args);
}
cudaError_t load_matrices_cuda(const LoadMatricesArgs& args, cudaStream_t stream) {
  return launch(load_matrices_kernel, 1, kWarp, kWarp * sizeof(uint4), stream, args);
}
cudaError_t round_cuda(const RoundArgs& args, cudaStream_t stream) {
  return launch(round_kernel, 1, 256, 0, stream, args);
}
cudaError_t mistake_cuda(const MistakeArgs& args, cudaStream_t stream) {
  return launch(mistake_kernel, 2, args.threads, (args.threads + 4) * sizeof(int), stream, args);
}

int64_t sum_workspace(const SumArgs& args) { return (args.count + 255) / 256 * 256 / kWarp * sizeof(float); }
cudaError_t sum_cuda(const SumArgs& args, cudaStream_t stream) {
  const cudaError_t error = launch(partial_sum_kernel, (args.count + 255) / 256, 256, 0, stream, args);
  return error == cudaSuccess ? launch(total_kernel, 1, 1, 0, stream, args) : error;
}

}  // namespace gafext
