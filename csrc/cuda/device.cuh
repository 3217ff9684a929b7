// The instructions that CUDA C++ has no name for, as inline PTX. A kernel uses these and plain CUDA, so that the host
// emulator of the tests (tests/cuda_emulator) can compile the very same kernel with its own version of this header.
//
// Fragments of mma_16x8x16, lane = 4 * g + t (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   A, 16 x 16   a[0] (row g, columns 2t, 2t+1)   a[1] (g+8, 2t..)   a[2] (g, 2t+8..)   a[3] (g+8, 2t+8..)
//   B, 16 x 8    b[0] (rows 2t, 2t+1, column g)   b[1] (rows 2t+8, 2t+9, column g)
//   C, 16 x 8    c[0] (row g, column 2t)   c[1] (g, 2t+1)   c[2] (g+8, 2t)   c[3] (g+8, 2t+1)
#pragma once

#ifdef GAFEXT_EMULATOR
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace gafext::cuda {

// The block's dynamic shared memory; kernels have no static one.
__device__ inline unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char gafext_dynamic_shared_memory[];
  return gafext_dynamic_shared_memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// blockIdx.x and threadIdx.x, read again each time: what is derived from them need not stay in registers between uses.
__device__ inline int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
__device__ inline int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// 16 bytes, 16-byte aligned, between global memory and registers: one instruction each, and successive loads are issued
// before the first is waited for. load_16 is for what is read once and not written meanwhile; where !inside it gives
// zeros and reads nothing.
__device__ inline uint4 load_16(const void* global, bool inside) {
  uint4 x;
  asm volatile(
      "{\n .reg .pred inside;\n setp.ne.b32 inside, %5, 0;\n"
      " mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
      " @inside ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(global), "r"(static_cast<int>(inside)));
  return x;
}
__device__ inline void store_16(void* global, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// Hides from the compiler where x comes from: what is computed from it twice is recomputed and not kept in registers.
__device__ inline void hide(uint4& x) { asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)); }

// 2^x to 2 units in the last place, -inf -> 0; denormal results are flushed to zero.
__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Two numbers side by side, `low` in the low half, rounded to nearest.
__device__ inline uint32_t pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 1 / x to a unit in the last place, infinity -> 0; denormal results are flushed to zero.
__device__ inline float reciprocal_approximate(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// c += A B with float32 accumulation, over the 32 lanes of a warp. Two products of half the depth on Turing. Volta has
// neither these products nor ldmatrix: kernels that use them are not launched there.
__device__ inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
  for (int k = 0; k < 2; ++k) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
  }
#else
  __trap();
#endif
}

// Ampere and later; a kernel for bfloat16 is not launched on Turing.
__device__ inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// Four 8 x 8 matrices of 2-byte elements from shared memory: lane 8 i + r gives the address of row r of matrix i, 16
// bytes, 16-byte aligned; r[i] is then (row lane / 4, columns 2 (lane % 4) and the next) of matrix i.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  __trap();
#endif
}
// The same, each matrix transposed.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  __trap();
#endif
}

// 16 bytes from global to shared memory, both 16-byte aligned; zeros, and nothing is read, where !inside. They have
// arrived for this thread after copies_wait, for the others after a barrier that follows it. Synchronous on Turing.
__device__ inline void copy_16_async(void* shared, const void* global, bool inside) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = inside ? *static_cast<const uint4*>(global) : uint4{};
#endif
}
// Ends a group of copies.
__device__ inline void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most `groups` of this thread's latest groups are still in flight.
template <int groups>
__device__ inline void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

}  // namespace gafext::cuda

#endif  // GAFEXT_EMULATOR
