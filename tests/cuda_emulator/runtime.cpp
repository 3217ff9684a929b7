// CUDA's host functions, and the C interface of the library for tests/emulator.py.
#include <algorithm>
#include <cstring>
#include <map>

#include "cuda_runtime.h"

namespace emulator {
namespace {

constexpr size_t kSharedWithoutAsking = 48 * 1024;
constexpr int kMostThreads = 1024;

std::map<const void*, size_t> shared_limits;  // that cudaFuncSetAttribute has raised

// CUDA programming guide, "Technical Specifications per Compute Capability": what a block may ask for.
size_t most_shared_memory() {
  switch (options.capability) {
    case 75:
      return 64 * 1024;
    case 80:
    case 87:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
      return 99 * 1024;
    default:
      return 227 * 1024;
  }
}

}  // namespace

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const auto raised = shared_limits.find(kernel);
  const size_t limit = raised == shared_limits.end() ? kSharedWithoutAsking : raised->second;
  if (threads == 0 || threads > kMostThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.x > 0x7fffffffu) return cudaErrorInvalidConfiguration;
  if (grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > std::max(limit, kSharedWithoutAsking)) return cudaErrorInvalidValue;
  if (config.numAttrs) return cudaErrorNotSupported;
  const bool succeeded =
      run_grid(kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config.dynamicSmemBytes, body);
  return succeeded ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > most_shared_memory()) return cudaErrorInvalidValue;
  shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = options.multiprocessors, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = options.capability / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = options.capability % 10, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = static_cast<int>(most_shared_memory()), cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define GAFEXT_NAME(name) \
  case name:              \
    return #name;
    GAFEXT_NAME(cudaSuccess)
    GAFEXT_NAME(cudaErrorInvalidValue)
    GAFEXT_NAME(cudaErrorInvalidConfiguration)
    GAFEXT_NAME(cudaErrorInvalidDevice)
    GAFEXT_NAME(cudaErrorNoKernelImageForDevice)
    GAFEXT_NAME(cudaErrorLaunchFailure)
    GAFEXT_NAME(cudaErrorNotSupported)
#undef GAFEXT_NAME
  }
  return "an unknown cudaError_t";
}

#define GAFEXT_EXPORT extern "C" __attribute__((visibility("default")))

// A fresh machine: no memory, no fault.
GAFEXT_EXPORT void emulator_reset(const Options* new_options) {
  options = *new_options;
  shared_limits.clear();
  free_all();
  clear_fault();
}
// `accessible` has a byte for each byte: 0 where the tensor has a gap.
GAFEXT_EXPORT void* emulator_place(const char* name, const void* data, const uint8_t* accessible, size_t bytes,
                                   size_t residue, bool is_output) {
  unsigned char* memory = allocate(bytes, residue, name);
  std::memcpy(memory, data, bytes);
  for (size_t i = 0; i < bytes; ++i) states(memory)[i] = !accessible[i] ? kNothing : is_output ? kWritable : kReadable;
  return memory;
}
// The bytes of an output, and whether each was written.
GAFEXT_EXPORT void emulator_fetch(const void* memory, void* data, uint8_t* written, size_t bytes) {
  std::memcpy(data, memory, bytes);
  for (size_t i = 0; i < bytes; ++i) written[i] = states(memory)[i] & kReadable;
}
GAFEXT_EXPORT const Fault* emulator_fault() { return first_fault.kernel ? &first_fault : nullptr; }
GAFEXT_EXPORT const char* emulator_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
