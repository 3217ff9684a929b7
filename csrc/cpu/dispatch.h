// Calls the copy of a CPU kernel that was compiled for this processor, like google/highway's HWY_EXPORT and
// HWY_DYNAMIC_DISPATCH.
#pragma once

#ifndef GAFEXT_WITHOUT_TORCH
#include <torch/csrc/stable/ops.h>
#endif

#include "../types.h"
#include "runtime.h"

// What every processor of a kind has: on Arm NEON.
#ifdef __aarch64__
#define GAFEXT_BASELINE neon
#else
#define GAFEXT_BASELINE portable
#endif
#ifdef GAFEXT_X86
#define GAFEXT_IF_X86(...) __VA_ARGS__
#else
#define GAFEXT_IF_X86(...)
#endif
#ifdef GAFEXT_AMX
#define GAFEXT_IF_AMX(...) __VA_ARGS__
#else
#define GAFEXT_IF_AMX(...)
#endif

#define GAFEXT_COPY(instruction_set, ...) \
  namespace instruction_set {             \
  GAFEXT_LOCAL __VA_ARGS__;               \
  }

namespace gafext::cpu {

// The calling thread's OpenMP runtime gets the number of torch.set_num_threads, as it does in PyTorch's own operations:
// each thread has a number of its own, and PyTorch sets it when the thread first asks.
inline void take_torch_threads() {
#ifndef GAFEXT_WITHOUT_TORCH
  thread_local const uint32_t threads = torch::stable::get_num_threads();
  static_cast<void>(threads);
#endif
}

}  // namespace gafext::cpu

// In csrc/ops/scale_add.cpp, in namespace gafext,
//
//   GAFEXT_CPU_KERNEL(void, scale_add, const float* x, const float* y, float scale, float* out, int64_t count)
//
// declares what csrc/cpu/scale_add.cpp defines in namespace gafext::GAFEXT_ISA, once per instruction set, and defines
// cpu::scale_add(x, y, scale, out, count), which calls the copy for instruction_set().
#define GAFEXT_CPU_KERNEL(result, name, ...)                                                        \
  GAFEXT_COPY(GAFEXT_BASELINE, result name(__VA_ARGS__))                                            \
  GAFEXT_IF_X86(GAFEXT_COPY(avx2, result name(__VA_ARGS__)))                                        \
  GAFEXT_IF_X86(GAFEXT_COPY(avx512, result name(__VA_ARGS__)))                                      \
  GAFEXT_IF_AMX(GAFEXT_COPY(amx, result name(__VA_ARGS__)))                                         \
  namespace cpu {                                                                                   \
  constexpr auto name = [](const auto&... args) -> result {                                         \
    using Copy = result (*)(__VA_ARGS__);                                                           \
    take_torch_threads();                                                                           \
    constexpr Copy copies[] = {GAFEXT_BASELINE::name,                                               \
                               GAFEXT_IF_X86(avx2::name, avx512::name, ) GAFEXT_IF_AMX(amx::name)}; \
    return copies[static_cast<int>(instruction_set())](args...);                                    \
  };                                                                                                \
  }
