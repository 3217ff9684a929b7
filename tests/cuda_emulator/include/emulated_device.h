// csrc/cuda/device.cuh for the host: the same functions, for the fragment layouts and the rules of the PTX ISA
// ("Matrix fragments for mma.m16n8k16", "ldmatrix", "cp.async").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace emulator {

uint4 load_16(const void* global, bool inside);
void store_16(void* global, uint4 x);
enum class Format { kFloat16, kBFloat16 };
void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b, Format format);
void load_matrices(uint32_t* r, const void* row, bool transposed);
void copy_16_async(void* shared, const void* global, bool inside);
void copies_commit();
void copies_wait(int groups);
float exp2_approximate(float x);

}  // namespace emulator

#define __cvta_generic_to_shared(pointer) emulator::shared_address(pointer)

namespace gafext::cuda {

inline unsigned char* dynamic_shared_memory() { return emulator::shared_memory(); }
using emulator::exp2_approximate;
using emulator::load_16;
using emulator::shared_address;
using emulator::store_16;
inline int block_index() { return static_cast<int>(blockIdx.x); }
inline int thread_index() { return static_cast<int>(threadIdx.x); }
inline void hide(uint4&) {}
inline float reciprocal_approximate(float x) { return 1.0f / x; }

inline uint32_t pack_pair(float low, float high, __half) {
  return __half(low).bits | static_cast<uint32_t>(__half(high).bits) << 16;
}
inline uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  return __nv_bfloat16(low).bits | static_cast<uint32_t>(__nv_bfloat16(high).bits) << 16;
}

inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  emulator::mma_16x8x16(c, a, b, emulator::Format::kFloat16);
}
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  emulator::mma_16x8x16(c, a, b, emulator::Format::kBFloat16);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, true); }

using emulator::copies_commit;
using emulator::copy_16_async;
template <int groups>
inline void copies_wait() {
  emulator::copies_wait(groups);
}

}  // namespace gafext::cuda
