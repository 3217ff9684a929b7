// What Hopper (sm_90a) adds and CUDA C++ has no name for: barriers in shared memory that count bytes, the copy engine
// for tiles (TMA), products by a warpgroup on the tensor cores (wgmma), registers that move between warpgroups.
// A kernel uses these, device.cuh and plain CUDA, so that tests/cuda_emulator can stand in for all of them.
//
// Layouts. Each was read in two public sources beside the PTX ISA: CUTLASS (include/cute/arch/mma_sm90_desc.hpp,
// include/cute/atom/mma_traits_sm90_gmma.hpp, include/cute/arch/copy_sm90_tma.hpp, include/cutlass/arch/barrier.h) and
// ThunderKittens (include/types/shared/descriptor.cuh, include/ops/group/mma/base/64x80.impl); the order of barriers
// and fences in CUTLASS and DeepGEMM (deep_gemm/include/deep_gemm/impls/sm90_bf16_gemm.cuh).
//
//   Panel         what one TMA copy writes: rows of 32, 64 or 128 bytes, one after the other, 16-byte chunks swizzled.
//                 Chunk c of row r lies at chunk c ^ (r % 8) in a row of 128 bytes, c ^ (r / 2 % 4) in one of 64,
//                 c ^ (r / 4 % 2) in one of 32: address bits 4.. are XORed with bits 7..., 3, 2 or 1 of them. So a
//                 panel starts at a multiple of 1024, 512, 256 bytes, and 8 rows x 16 bytes fall on all 32 banks.
//   Descriptor    64 bits, where an operand of wgmma lies: address / 16 in bits 0..13, leading offset / 16 in
//                 16..29, stride offset / 16 in 32..45, the swizzle in 62..63 (1, 2, 3: rows of 128, 64, 32 bytes).
//   K-major       rows of the operand are rows of the panel (Q, K): 16 columns of the product's depth are 32 bytes of a
//                 row, the next 16 begin 32 bytes on. Stride offset: from 8 rows to the next 8. Leading offset: unused.
//   MN-major      rows of the panel are the product's depth (V): 16 of them per product, the next 16 begin 16 rows on.
//                 Stride offset: from 8 rows to the next 8. Leading offset: from one panel to the panel right of it.
//   Accumulator   64 x N over the 128 threads of a warpgroup: warp w has the rows 16 w .. 16 w + 15, and in it lane
//                 4 g + t has c[4 j + 2 h + e] at row 16 w + g + 8 h, column 8 j + 2 t + e.
//   A, registers  64 x 16, two elements per register: a[h + 2 i] at row 16 w + g + 8 h, columns 8 i + 2 t and the next.
//                 So accumulators 8 k .. 8 k + 7, rounded and packed in pairs, are the k-th A of a next product.
#pragma once

#include "device.cuh"

#ifdef GAFEXT_EMULATOR
#include "emulated_hopper.h"
#else

#include <cuda.h>

namespace gafext::cuda {

using TensorMap = CUtensorMap;

// A map of the (batch, heads, rows, columns) tensor at `base` for copies of (panel_columns x panel_rows) elements of
// two bytes, the panels swizzled over their rows. Strides in bytes, multiples of 16, of row, head and batch.
inline cudaError_t encode_tensor_map(TensorMap& map, const void* base, bool is_bfloat16, const uint64_t (&extents)[4],
                                     const uint64_t (&strides)[3], uint32_t panel_columns, uint32_t panel_rows) {
  // Through the runtime, so that nothing links against libcuda and the module loads on machines without a driver.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  const uint32_t box[4] = {panel_columns, panel_rows, 1, 1}, element_strides[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = panel_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : panel_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                           : CU_TENSOR_MAP_SWIZZLE_32B;
  const auto encode_now = [&] {
    return encode(&map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                  const_cast<void*>(base), extents, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode_now();
  if (result != CUDA_SUCCESS) {
    // The driver encodes for the thread's current context, and a new thread has none: unlike a launch, nothing here
    // makes one current, nor does PyTorch, whose allocator gave the output from its cache. cudaSetDevice does.
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    result = encode_now();
  }
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A barrier is in phase 0, 1, 2, ...; a phase ends when `count` arrivals and all bytes announced in it have come.
using Barrier = uint64_t;

__device__ inline void barrier_init(Barrier& barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}
// By the thread that initialised barriers, before the __syncthreads() after which the others and TMA may use them.
__device__ inline void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives and announces the bytes that TMA will write in this phase.
__device__ inline void barrier_arrive_expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
// Until the phase whose number has this parity is over. The phase before the first counts as over: on a new barrier
// parity 1 does not wait.
__device__ inline void barrier_wait(Barrier& barrier, uint32_t parity) {
  uint32_t is_over;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(is_over)
                 : "r"(shared_address(&barrier)), "r"(parity)
                 : "memory");
  } while (!is_over);
}

// One of the 15 numbered barriers of a block (0 is __syncthreads()): by whole warps, `threads` in all wait or arrive.
__device__ inline void numbered_barrier_wait(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void numbered_barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ inline void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// By one thread: the panel at (batch, head, row, column), zeros where it is outside of the tensor. Its bytes, outside
// or not, count for the barrier.
__device__ inline void copy_panel_async(void* shared, const TensorMap& map, Barrier& barrier, int column, int row,
                                        int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(&barrier))
      : "memory");
}

// All warps of a warpgroup, each role of the kernel once, at its start.
template <int registers>
__device__ inline void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ inline void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

__device__ inline uint64_t matrix_descriptor(const void* start, uint32_t leading_bytes, uint32_t stride_bytes,
                                             uint32_t panel_row_bytes) {
  const uint64_t swizzle = panel_row_bytes == 128 ? 1 : panel_row_bytes == 64 ? 2 : 3;
  return (shared_address(start) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | swizzle << 62;
}

// The compiler keeps what it knows of these registers on its side of this point.
template <size_t N>
__device__ inline void pin(float (&registers)[N]) {
#pragma unroll
  for (size_t i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <size_t N>
__device__ inline void pin(uint32_t (&registers)[N]) {
#pragma unroll
  for (size_t i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// A product is asynchronous: products_begin with all registers it uses, products, products_commit, and after
// products_wait<pending> all but the last `pending` groups are done: only then may their registers (given again) be
// touched and their shared memory be written.
template <typename... Registers>
__device__ inline void products_begin(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending, typename... Registers>
__device__ inline void products_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  (pin(registers), ...);
}

#define GAFEXT_LIST_8(c, i)                                                                                   \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define GAFEXT_LIST_32(c, i) \
  GAFEXT_LIST_8(c, i), GAFEXT_LIST_8(c, i + 8), GAFEXT_LIST_8(c, i + 16), GAFEXT_LIST_8(c, i + 24)
#define GAFEXT_LIST_40(c, i) GAFEXT_LIST_32(c, i), GAFEXT_LIST_8(c, i + 32)
#define GAFEXT_LIST_48(c, i) GAFEXT_LIST_40(c, i), GAFEXT_LIST_8(c, i + 40)
#define GAFEXT_LIST_64(c, i) GAFEXT_LIST_32(c, i), GAFEXT_LIST_32(c, i + 32)
#define GAFEXT_NAMES_32                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define GAFEXT_NAMES_40 GAFEXT_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define GAFEXT_NAMES_48 GAFEXT_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define GAFEXT_NAMES_64 \
  GAFEXT_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c (+)= A B, 64 x 96 or 128 over a depth of 16, both K-major in shared memory; c is overwritten unless `accumulate`.
#define GAFEXT_PRODUCT_SHARED(Element, type, columns, n, a0, b0, flag)                                      \
  __device__ inline void product(float (&c)[n], uint64_t a, uint64_t b, bool accumulate, Element) {         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
                 "k16.f32." type "." type " {" GAFEXT_NAMES_##n "}, " a0 ", " b0 ", p, 1, 1, 0, 0;\n}\n"    \
                 : GAFEXT_LIST_##n(c, 0)                                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                      \
  }
#define GAFEXT_PRODUCTS_SHARED(Element, type)                         \
  GAFEXT_PRODUCT_SHARED(Element, type, "96", 48, "%48", "%49", "%50") \
  GAFEXT_PRODUCT_SHARED(Element, type, "128", 64, "%64", "%65", "%66")
GAFEXT_PRODUCTS_SHARED(__half, "f16")
GAFEXT_PRODUCTS_SHARED(__nv_bfloat16, "bf16")

// c (+)= A B, 64 x 64, 80 or 128 over a depth of 16, A in registers a[0..3], B MN-major in shared memory.
#define GAFEXT_PRODUCT_REGISTERS(Element, type, columns, n, a0, a1, a2, a3, b0, flag)                       \
  __device__ inline void product(float (&c)[n], const uint32_t* a, uint64_t b, bool accumulate, Element) {  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
                 "k16.f32." type "." type " {" GAFEXT_NAMES_##n "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b0  \
                                                                ", p, 1, 1, 1;\n}\n"                        \
                 : GAFEXT_LIST_##n(c, 0)                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));  \
  }
#define GAFEXT_PRODUCTS_REGISTERS(Element, type)                                              \
  GAFEXT_PRODUCT_REGISTERS(Element, type, "64", 32, "%32", "%33", "%34", "%35", "%36", "%37") \
  GAFEXT_PRODUCT_REGISTERS(Element, type, "80", 40, "%40", "%41", "%42", "%43", "%44", "%45") \
  GAFEXT_PRODUCT_REGISTERS(Element, type, "128", 64, "%64", "%65", "%66", "%67", "%68", "%69")
GAFEXT_PRODUCTS_REGISTERS(__half, "f16")
GAFEXT_PRODUCTS_REGISTERS(__nv_bfloat16, "bf16")

#undef GAFEXT_LIST_8
#undef GAFEXT_LIST_32
#undef GAFEXT_LIST_40
#undef GAFEXT_LIST_48
#undef GAFEXT_LIST_64
#undef GAFEXT_NAMES_32
#undef GAFEXT_NAMES_40
#undef GAFEXT_NAMES_48
#undef GAFEXT_NAMES_64
#undef GAFEXT_PRODUCT_SHARED
#undef GAFEXT_PRODUCTS_SHARED
#undef GAFEXT_PRODUCT_REGISTERS
#undef GAFEXT_PRODUCTS_REGISTERS

}  // namespace gafext::cuda

#endif  // GAFEXT_EMULATOR
