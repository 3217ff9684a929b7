// Which attention kernel serves which arguments, how it divides the work over blocks, and the kernel that combines the
// results of split keys. With the references r_s of the splits and r their maximum an output is the sum of
// 2^(r_s - r) outputs_s over that of 2^(r_s - r) sum_s. One row per warp, two columns per lane; no shared memory.
// 2 splits D FLOPs per row, 4 splits (D + 2) bytes read and 2 D written: 2.3 MB at (rows, splits, D) = (1024, 8, 64).
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>

#include "flash_attention.cuh"
#include "softmax.cuh"

namespace gafext {
namespace cuda {
namespace {

struct Device {
  int capability;  // 10 * major + minor
  int multiprocessors;
  int shared_bytes;  // that a block may ask for
};

cudaError_t current_device(Device& device) {
  int index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  read(major, cudaDevAttrComputeCapabilityMajor);
  read(minor, cudaDevAttrComputeCapabilityMinor);
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.capability = 10 * major + minor;
  return error;
}

bool has_copied_rows(const void* base, const HeadStrides& stride) {
  return has_aligned_rows(base, stride) && std::abs(stride.row) <= std::numeric_limits<int32_t>::max();
}

bool fits_tensor_cores(const FlashAttentionArgs& args, const Device& device) {
  constexpr int64_t kMaxLength = 1 << 30;  // rows, and pairs of batch and head, have 32-bit indices there
  const bool has_instructions = device.capability >= 80 || (device.capability >= 75 && args.dtype == DType::kFloat16 &&
                                                            args.head_dim <= kMaxHeadDim);
  return args.dtype != DType::kFloat32 && has_instructions && args.head_dim % 8 == 0 &&
         std::max(args.query_length, args.key_length) <= kMaxLength && args.batch * args.heads <= kMaxLength &&
         has_copied_rows(args.query, args.query_stride) && has_copied_rows(args.key, args.key_stride) &&
         has_copied_rows(args.value, args.value_stride) && has_copied_rows(args.out, args.out_stride);
}

// GAFEXT_CUDA_ATTENTION=mma in the environment: mma.sync on Hopper too, to compare the two kernels on one card.
bool without_sm90() {
  const char* wanted = std::getenv("GAFEXT_CUDA_ATTENTION");
  return wanted != nullptr && std::strcmp(wanted, "mma") == 0;
}

// None of these limits was measured: they await a GPU.
FlashPlan plan_for(const FlashAttentionArgs& args, const Device& device) {
  FlashPlan plan{FlashKernel::kSimple, 0, 1, 1, 0};
  if (!fits_tensor_cores(args, device)) return plan;
  if (device.capability == 90 && serves_sm90(args) && !without_sm90()) {
    plan.kernel = FlashKernel::kSm90;
    return plan;
  }
  const bool wide = args.head_dim > kMaxHeadDim;
  plan.columns = *std::lower_bound(std::begin(kHeadSizes), std::end(kHeadSizes), args.head_dim);
  plan.kernel = wide ? FlashKernel::kWide : FlashKernel::kMma;

  // Twice the rows halve the reads of keys and values, as long as every multiprocessor has its two blocks (one of wide
  // heads and of 160 columns, whose registers leave no room for a second).
  const int few = wide ? 32 : 64, many = 2 * few;
  plan.rows = many;
  const bool fits = wide ? device.shared_bytes >= 132 * 1024 : args.head_dim <= 160;
  const bool fills = plan.blocks(args) >= (wide || plan.columns == 160 ? 1 : 2) * device.multiprocessors;
  if (!fits || !fills || args.query_length <= (wide ? few : 256)) plan.rows = few;

  // Keys are split where blocks of the rows alone leave half of the multiprocessors idle; `unit` keys are worth the
  // reading and writing of a partial result, and are whole tiles.
  const int64_t unit = wide ? 256 : 512, units = (args.key_length + unit - 1) / unit;
  const int64_t blocks = std::max<int64_t>(plan.blocks(args), 1);
  const int64_t wanted = std::clamp<int64_t>(device.multiprocessors / blocks, 1, std::max<int64_t>(units, 1));
  plan.split_keys = static_cast<int>(std::max<int64_t>((units + wanted - 1) / wanted, 1) * unit);
  plan.splits = static_cast<int>(std::max<int64_t>((args.key_length + plan.split_keys - 1) / plan.split_keys, 1));
  return plan;
}

template <typename T>
cudaError_t by_tensor_cores(const FlashAttentionArgs& args, const FlashPlan& plan, cudaStream_t stream) {
  const cudaError_t error = plan.kernel == FlashKernel::kWide ? flash_attention_wide<T>(args, plan, stream)
                                                              : flash_attention_mma<T>(args, plan, stream);
  return error == cudaSuccess && plan.splits > 1 ? flash_attention_combine<T>(args, plan, stream) : error;
}

constexpr int kCombineWarps = 4;

template <typename T>
__global__ void flash_attention_combine_kernel(const FlashAttentionArgs args, int splits, int columns) {
  const int lane = threadIdx.x % kWarp;
  const int64_t rows = args.batch * args.heads * args.query_length;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kCombineWarps + threadIdx.x / kWarp;
  if (index >= rows) return;
  const float* outputs = static_cast<const float*>(args.workspace) + index * columns;
  const float2* statistics = static_cast<const float2*>(args.workspace) + splits * rows * columns / 2 + index;

  float reference = kNoReference, sum = 0.0f;
  for (int s = 0; s < splits; ++s) reference = fmaxf(reference, statistics[s * rows].x);
  for (int s = 0; s < splits; ++s) sum += exp2f(statistics[s * rows].x - reference) * statistics[s * rows].y;
  const float inverse = inverse_sum(sum);

  const int64_t head = index / args.query_length, row = index % args.query_length;
  T* out = row_of<T>(args.out, args.out_stride, head / args.heads, head % args.heads, row);
  for (int64_t column = lane * 2; column < args.head_dim; column += 2 * kWarp) {
    float low = 0.0f, high = 0.0f;
    for (int s = 0; s < splits; ++s) {
      const float weight = exp2f(statistics[s * rows].x - reference);
      const float2 pair = *reinterpret_cast<const float2*>(outputs + s * rows * columns + column);
      low += weight * pair.x, high += weight * pair.y;
    }
    *reinterpret_cast<uint32_t*>(out + column) = pack_pair(low * inverse, high * inverse, T());
  }
}

}  // namespace

template <typename T>
cudaError_t flash_attention_combine(const FlashAttentionArgs& args, const FlashPlan& plan, cudaStream_t stream) {
  const int64_t rows = args.batch * args.heads * args.query_length;
  return launch(flash_attention_combine_kernel<T>, (rows + kCombineWarps - 1) / kCombineWarps, kCombineWarps * kWarp, 0,
                stream, args, plan.splits, plan.columns);
}

}  // namespace cuda

cudaError_t flash_attention_cuda_workspace(const FlashAttentionArgs& args, int64_t& bytes) {
  using namespace cuda;
  Device device{};
  const cudaError_t error = current_device(device);
  const FlashPlan plan = plan_for(args, device);
  const int64_t rows = args.batch * args.heads * args.query_length;
  bytes = plan.splits > 1 ? plan.splits * rows * (plan.columns + 2) * static_cast<int64_t>(sizeof(float)) : 0;
  return error;
}

cudaError_t flash_attention_cuda(const FlashAttentionArgs& args, cudaStream_t stream) {
  using namespace cuda;
  if (args.batch * args.heads * args.query_length == 0) return cudaSuccess;
  Device device{};
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const FlashPlan plan = plan_for(args, device);
  if (plan.splits > 1 && args.workspace == nullptr) return cudaErrorInvalidValue;
  if (plan.kernel == FlashKernel::kSimple) {
    return args.head_dim <= kMaxHeadDim ? flash_attention_simple(args, stream) : cudaErrorNotSupported;
  }
  if (plan.kernel == FlashKernel::kSm90) return flash_attention_sm90(args, stream);
  return args.dtype == DType::kFloat16 ? by_tensor_cores<__half>(args, plan, stream)
                                       : by_tensor_cores<__nv_bfloat16>(args, plan, stream);
}

}  // namespace gafext
