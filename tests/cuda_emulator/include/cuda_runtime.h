// The part of CUDA C++ that kernels use, as C++ over the emulated machine. Stands in for CUDA's own header of that
// name. The instructions of a warp and the barriers follow the CUDA programming guide, "Warp Shuffle Functions" etc.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../machine.h"
#include "cuda_runtime_api.h"
#include "emulated_math.h"
#include "emulated_vectors.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __restrict__ __restrict
#define __shared__ the_emulator_knows_dynamic_shared_memory_only_see_device_cuh

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// The compiler makes no hooks for the accesses of these.
extern "C" {
void* emulated_memcpy(void* destination, const void* source, size_t bytes);
void* emulated_memmove(void* destination, const void* source, size_t bytes);
void* emulated_memset(void* destination, int value, size_t bytes);
}
#ifdef GAFEXT_EMULATED_KERNEL
namespace std {
using ::emulated_memcpy, ::emulated_memmove, ::emulated_memset;
}
#define memcpy emulated_memcpy
#define memmove emulated_memmove
#define memset emulated_memset
#endif

// Launch.

namespace emulator {
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& body);
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  return emulator::launch(reinterpret_cast<const void*>(kernel), *config, [&] { std::apply(kernel, values); });
}

// Barriers and votes.

inline void __syncthreads() { emulator::barrier("__syncthreads"); }
inline int __syncthreads_or(int predicate) { return emulator::barrier("__syncthreads_or", 0, 0, predicate).any; }
inline int __syncthreads_and(int predicate) { return emulator::barrier("__syncthreads_and", 0, 0, predicate).all; }
inline int __syncthreads_count(int predicate) {
  return emulator::barrier("__syncthreads_count", 0, 0, predicate).count;
}
void __syncwarp(unsigned mask = 0xffffffffu);
unsigned __ballot_sync(unsigned mask, int predicate);
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
int __all_sync(unsigned mask, int predicate);
unsigned __match_any_sync(unsigned mask, uint64_t value);
[[noreturn]] inline void __trap() { emulator::fault("__trap"); }

// Shuffles, of 4 and 8 bytes, or 2.

namespace emulator {
enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(const char* what, Shuffle kind, unsigned mask, uint64_t value, int argument, int width);
template <typename T>
T shuffle_value(const char* what, Shuffle kind, unsigned mask, T value, int argument, int width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle(what, kind, mask, bits, argument, width);
  __builtin_memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}
}  // namespace emulator
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  return emulator::shuffle_value("__shfl_sync", emulator::Shuffle::kIndex, mask, value, lane, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return emulator::shuffle_value("__shfl_up_sync", emulator::Shuffle::kUp, mask, value, delta, width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return emulator::shuffle_value("__shfl_down_sync", emulator::Shuffle::kDown, mask, value, delta, width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  return emulator::shuffle_value("__shfl_xor_sync", emulator::Shuffle::kXor, mask, value, lane_mask, width);
}
