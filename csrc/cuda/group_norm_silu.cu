// GroupNorm and SiLU of channels-last memory, (batch, positions, channels): one read and one write of x where a slab
// fits a block's registers, otherwise two reads, the second from the L2 cache as a rule, and one write.
//
// Slab      The fewest whole groups whose channels make whole 16-byte packs, and 32 bytes, a memory sector, where
//           possible: 40 channels, 4 groups of 10, in half precision at 320 channels and 32 groups. Single elements and
//           one group where memory is not aligned.
// Mapping   A block takes a slab of one image, or a chunk of its positions. A thread keeps one pack of the channels and
//           up to 16 positions of it in registers, all loaded before the first use: moments and result (in float32)
//           need no other read. A slab of up to 96 KB, 16 packs of 384 threads, is one kernel. A larger one goes in
//           chunks of 32 KB: one kernel writes the moments of every chunk to scratch memory; in a second one each block
//           adds them up for itself and does the rest. Where the blocks are too few for the multiprocessors, slabs of
//           more than 32 KB go in chunks, too.
// Shared    Sums per group and warp: 1.2 KB.
// FLOPs     About 25 per element, two of them special functions (exp, reciprocal).
// Bytes     2 elements: 10.5 MB in half precision at (batch, positions, channels) = (8, 1024, 320), 3.1 us at the 3.35
//           TB/s of an H100; PyTorch's own pair reads and writes about five times as much.
#include <algorithm>
#include <numeric>

#include "../ops/group_norm_silu.h"
#include "common.cuh"

namespace gafext {
namespace cuda {
namespace {

constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / kWarp;
constexpr int kMaxGroups = 16;                       // of a slab: one channel each in 32 bytes
constexpr int kFewPacks = 4;                         // per thread: of a small slab, in one kernel
constexpr int kManyPacks = 16, kManyThreads = 384;   // of the largest slab in one kernel
constexpr int kChunkPacks = 8, kChunkThreads = 256;  // of a chunk, two kernels
constexpr int64_t kEnoughBlocks = 64;                // for half of an H100
constexpr int kSharedFloats = kMaxGroups * (3 + kMaxWarps);

// How the work is divided, the same for every block.
struct Division {
  int groups, channels;  // of a slab
  int packs, rows;       // a thread's place in the block is (row, pack), the pack fastest
  int slabs, chunks;     // of an image
  int positions_of_chunk;
};

enum class Pass { kWhole, kMoments, kApply };  // both at once, or chunk by chunk

// What a block works on, and what this thread does.
template <int kSize>
struct Place {
  int64_t batch;
  int slab, chunk, first_position, channel;  // the channel of the whole image
  int positions;                             // of the image
  int count;                                 // of this thread's own, which lie division.rows apart
  int group[kSize];                          // of each channel, within the slab

  __device__ Place(const GroupNormSiluArgs& args, const Division& division) {
    const uint32_t chunk_of_all = blockIdx.x / division.slabs;
    slab = blockIdx.x % division.slabs, chunk = chunk_of_all % division.chunks, batch = chunk_of_all / division.chunks;
    const int row = threadIdx.x / division.packs, first = threadIdx.x % division.packs * kSize;
    const int channels_of_group = division.channels / division.groups;
    positions = args.positions;
    first_position = chunk * division.positions_of_chunk + row;
    channel = slab * division.channels + first;
    count = max((positions - first_position + division.rows - 1) / division.rows, 0);
    if (row >= division.rows) count = 0;
    int in_group = first % channels_of_group, g = first / channels_of_group;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      group[e] = g;
      if (++in_group == channels_of_group) in_group = 0, ++g;
    }
  }
};

// In shared memory, by group: the moments of the distances from `origin`, a number close to the mean. The variance,
// which is the mean square less the square of the mean, then loses few digits.
struct Statistics {
  float *origin, *mean, *square, *of_warps;

  __device__ Statistics() {
    origin = reinterpret_cast<float*>(dynamic_shared_memory());
    mean = origin + kMaxGroups, square = mean + kMaxGroups, of_warps = square + kMaxGroups;
  }
};

// means[g] is the sum over the block of x[e] with group[e] == g, always in the same order, divided by count.
template <int kSize>
__device__ void means_by_group(const float (&x)[kSize], const Place<kSize>& place, int groups, float count,
                               float* of_warps, float* means) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int g = 0; g < groups; ++g) {
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < kSize; ++e) sum += place.group[e] == g ? x[e] : 0.0f;
    sum = warp_sum(sum);
    if (lane == 0) of_warps[g * kMaxWarps + warp] = sum;
  }
  __syncthreads();
  for (int g = warp; g < groups; g += warps) {
    const float sum = warp_sum(lane < warps ? of_warps[g * kMaxWarps + lane] : 0.0f);
    if (lane == 0) means[g] = sum / count;
  }
  __syncthreads();
}

// The moments of what the block holds. The origin is the mean of the first packs of its threads: at worst, where those
// differ from all others, the variance loses a factor of kPacks in accuracy.
template <typename T, int kSize, int kPacks>
__device__ void take_statistics(const Pack<T, kSize> (&data)[kPacks], const GroupNormSiluArgs& args,
                                const Division& division, const Place<kSize>& place, const Statistics& statistics) {
  const int inside = min(division.positions_of_chunk, place.positions - place.chunk * division.positions_of_chunk);
  const float channels = division.channels / division.groups;
  float origin[kSize], sum[kSize] = {}, square[kSize] = {};
  to_floats(data[0], origin);
  means_by_group(origin, place, division.groups, min(division.rows, inside) * channels, statistics.of_warps,
                 statistics.origin);
#pragma unroll
  for (int e = 0; e < kSize; ++e) origin[e] = statistics.origin[place.group[e]];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    float v[kSize];
    to_floats(data[k], v);
    if (k >= place.count) break;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float distance = v[e] - origin[e];
      sum[e] += distance;
      square[e] += distance * distance;
    }
  }
  means_by_group(sum, place, division.groups, inside * channels, statistics.of_warps, statistics.mean);
  means_by_group(square, place, division.groups, inside * channels, statistics.of_warps, statistics.square);
}

struct Moments {  // of a chunk and group, in scratch memory
  float mean, variance;
};

// The moments of all chunks of an image, relative to the mean of the first. One group per warp.
__device__ void add_up_chunks(const Moments* of_chunks, int positions, const Division& division,
                              const Statistics& statistics) {
  const int lane = threadIdx.x % kWarp;
  const float all = 1.0f / static_cast<float>(positions);
  for (int g = threadIdx.x / kWarp; g < division.groups; g += blockDim.x / kWarp) {
    const Moments* chunk = of_chunks + g * division.chunks;
    const float origin = chunk[0].mean;
    float mean = 0.0f, square = 0.0f;
#pragma unroll 1
    for (int i = lane; i < division.chunks; i += kWarp) {
      const float share = min(division.positions_of_chunk, positions - i * division.positions_of_chunk) * all;
      const float distance = chunk[i].mean - origin;
      mean += share * distance;
      square += share * (chunk[i].variance + distance * distance);
    }
    mean = warp_sum(mean), square = warp_sum(square);
    if (lane == 0) statistics.origin[g] = origin, statistics.mean[g] = mean, statistics.square[g] = square;
  }
  __syncthreads();
}

template <int kPacks>
constexpr int kMostThreads = kPacks == kManyPacks ? kManyThreads : kMaxThreads;  // for the registers of their packs

template <typename T, int kSize, int kPacks, Pass pass>
__global__ void __launch_bounds__(kMostThreads<kPacks>, 1)
    group_norm_silu_kernel(const GroupNormSiluArgs args, const Division division) {
  const Statistics statistics;
  const Place<kSize> place(args, division);
  const T* x = static_cast<const T*>(args.x) + place.batch * args.image_stride +
               place.first_position * args.position_stride + place.channel;
  Pack<T, kSize> data[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k, x += division.rows * args.position_stride) {
    data[k] = load_pack<T, kSize>(x, k < place.count);
  }
  const auto of_channels = [&](const void* base) {  // zeros for null
    return load_pack<T, kSize>(static_cast<const T*>(base) + place.channel, base && pass != Pass::kMoments);
  };
  const auto weight = of_channels(args.weight), bias = of_channels(args.bias);

  Moments* of_chunks = static_cast<Moments*>(args.scratch) +
                       (place.batch * args.groups + place.slab * division.groups) * division.chunks;
  if constexpr (pass == Pass::kApply) {
    add_up_chunks(of_chunks, place.positions, division, statistics);
  } else {
    take_statistics(data, args, division, place, statistics);
  }
  if constexpr (pass == Pass::kMoments) {
    const int g = threadIdx.x;
    if (g < division.groups) {
      const float mean = statistics.mean[g];
      of_chunks[g * division.chunks + place.chunk] = {statistics.origin[g] + mean, statistics.square[g] - mean * mean};
    }
    return;
  }

  float origin[kSize], scale[kSize], shift[kSize];
  to_floats(weight, scale);
  to_floats(bias, shift);
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    const int g = place.group[e];
    const float mean = statistics.mean[g];
    origin[e] = statistics.origin[g];
    scale[e] = (args.weight ? scale[e] : 1.0f) * rsqrtf(statistics.square[g] - mean * mean + args.eps);
    shift[e] -= mean * scale[e];
  }
  T* out = static_cast<T*>(args.out) + (place.batch * place.positions + place.first_position) * args.channels +
           place.channel;
#pragma unroll
  for (int k = 0; k < kPacks; ++k, out += division.rows * args.channels) {
    // Otherwise the compiler keeps the distances computed for the statistics, and there are no registers for them.
    if constexpr (kSize > 1) hide(data[k].bits);
    float v[kSize];
    to_floats(data[k], v);
#pragma unroll
    for (int e = 0; e < kSize; ++e) v[e] = (v[e] - origin[e]) * scale[e] + shift[e];
    if (args.silu) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) v[e] *= reciprocal_approximate(1.0f + exp2_approximate(v[e] * -kLog2E));
    }
    if (k < place.count) store_pack(out, from_floats<T>(v));
  }
}

bool all_take_packs(const GroupNormSiluArgs& args) {
  return takes_packs(args.x, args.image_stride | args.position_stride, args.dtype) &&
         takes_packs(args.out, args.channels, args.dtype) && takes_packs(args.weight, 0, args.dtype) &&
         takes_packs(args.bias, 0, args.dtype);
}

struct Plan {
  Division division;
  int size, packs_of_thread;  // elements of a pack
  int threads() const { return (division.rows * division.packs + kWarp - 1) / kWarp * kWarp; }
  bool in_chunks() const { return division.chunks > 1; }
};

Plan plan_for(const GroupNormSiluArgs& args) {
  const int64_t channels = args.channels / args.groups;  // of a group
  const int whole = args.dtype == DType::kFloat32 ? 4 : 8;
  Plan plan{};
  plan.size = all_take_packs(args) ? whole : 1;
  Division& d = plan.division;
  d.groups = static_cast<int>(plan.size / std::gcd(channels, static_cast<int64_t>(plan.size)));
  if (plan.size > 1 && d.groups * channels < 2 * plan.size && args.groups % (2 * d.groups) == 0) d.groups *= 2;
  d.channels = static_cast<int>(d.groups * channels);
  d.packs = d.channels / plan.size;
  d.slabs = static_cast<int>(args.groups / d.groups);

  const auto rows_for = [&](int64_t packs) { return (args.positions + packs - 1) / packs; };
  const int64_t most_rows = kMaxThreads / d.packs, blocks = args.batch * d.slabs;
  if (rows_for(kFewPacks) <= most_rows) {
    plan.packs_of_thread = kFewPacks, d.rows = static_cast<int>(rows_for(kFewPacks));
  } else if (rows_for(kManyPacks) <= kManyThreads / d.packs && blocks >= kEnoughBlocks) {
    plan.packs_of_thread = kManyPacks, d.rows = static_cast<int>(rows_for(kManyPacks));
  } else {
    plan.packs_of_thread = kChunkPacks, d.rows = std::max(kChunkThreads / d.packs, 1);
  }
  d.positions_of_chunk = d.rows * plan.packs_of_thread;
  d.chunks = static_cast<int>((args.positions + d.positions_of_chunk - 1) / d.positions_of_chunk);
  return plan;
}

template <typename T, int kSize, int kPacks, Pass pass>
cudaError_t launch_pass(const GroupNormSiluArgs& args, const Plan& plan, cudaStream_t stream) {
  if (plan.threads() > kMostThreads<kPacks>) return cudaErrorInvalidConfiguration;  // as a GPU says, and no emulator
  const int64_t blocks = args.batch * plan.division.chunks * plan.division.slabs;
  return launch(group_norm_silu_kernel<T, kSize, kPacks, pass>, blocks, plan.threads(), kSharedFloats * sizeof(float),
                stream, args, plan.division);
}

template <typename T, int kSize>
cudaError_t launch_plan(const GroupNormSiluArgs& args, const Plan& plan, cudaStream_t stream) {
  if (plan.in_chunks()) {
    const cudaError_t error = launch_pass<T, kSize, kChunkPacks, Pass::kMoments>(args, plan, stream);
    return error != cudaSuccess ? error : launch_pass<T, kSize, kChunkPacks, Pass::kApply>(args, plan, stream);
  }
  if (plan.packs_of_thread == kFewPacks) return launch_pass<T, kSize, kFewPacks, Pass::kWhole>(args, plan, stream);
  if (plan.packs_of_thread == kManyPacks) return launch_pass<T, kSize, kManyPacks, Pass::kWhole>(args, plan, stream);
  return launch_pass<T, kSize, kChunkPacks, Pass::kWhole>(args, plan, stream);  // one chunk of a wide slab
}

}  // namespace
}  // namespace cuda

int64_t group_norm_silu_scratch(const GroupNormSiluArgs& args) {
  if (args.batch * args.positions * args.channels == 0) return 0;
  const cuda::Plan plan = cuda::plan_for(args);
  return plan.in_chunks() ? args.batch * args.groups * plan.division.chunks * sizeof(cuda::Moments) : 0;
}

cudaError_t group_norm_silu_cuda(const GroupNormSiluArgs& args, cudaStream_t stream) {
  using namespace cuda;
  if (args.batch * args.positions * args.channels == 0) return cudaSuccess;
  if (args.positions > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
  const Plan plan = plan_for(args);
  return with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    return plan.size == 1 ? launch_plan<T, 1>(args, plan, stream) : launch_plan<T, kPackSize<T>>(args, plan, stream);
  });
}

}  // namespace gafext
