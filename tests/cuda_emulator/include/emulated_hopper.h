// csrc/cuda/hopper.cuh for the host emulator: the same functions with the semantics that the PTX ISA documents. What is
// asynchronous on the card is late here, and what must not be relied on is spoilt meanwhile:
//
//   copies      the bytes are refused to everyone from copy_panel_async until they arrive, some steps of the scheduler
//               later, panel by panel, in any order; each then counts for its barrier.
//   products    operands are read through their descriptors both at the product and at its products_wait, by the first
//               lane of the warp (the race detector sees both); accumulators are NaN in between, and registers that
//               change meanwhile, or have changed since products_begin, are faults.
//   barriers    keep count, bytes and phase; one arrival too many, bytes that were not announced, use before
//               barriers_visible() and __syncthreads() are faults, and a wait that nobody ends is the emulator's.
//
// The layouts are those that hopper.cuh documents, with its sources; here they are computed from addresses and
// descriptors alone, there from tiles and panels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../machine.h"
#include "emulated_device.h"

namespace gafext::cuda {

struct alignas(64) TensorMap {
  const unsigned char* base;
  uint64_t extents[4], strides[4];  // columns, rows, heads, batch; bytes
  uint32_t panel_columns, panel_rows;
};
using Barrier = uint64_t;

cudaError_t encode_tensor_map(TensorMap& map, const void* base, bool is_bfloat16, const uint64_t (&extents)[4],
                              const uint64_t (&strides)[3], uint32_t panel_columns, uint32_t panel_rows);

void barrier_init(Barrier& barrier, int count);
void barriers_visible();
void barrier_arrive(Barrier& barrier);
void barrier_arrive_expect(Barrier& barrier, int bytes);
void barrier_wait(Barrier& barrier, uint32_t parity);
void numbered_barrier_wait(int number, int threads);
void numbered_barrier_arrive(int number, int threads);

inline void prefetch_tensor_map(const TensorMap&) {}
void copy_panel_async(void* shared, const TensorMap& map, Barrier& barrier, int column, int row, int head, int batch);
uint64_t matrix_descriptor(const void* start, uint32_t leading_bytes, uint32_t stride_bytes, uint32_t panel_row_bytes);

namespace emulated {
uint32_t swizzled(uint32_t address, uint32_t panel_row_bytes);
void new_block();
void thread_exits();
void set_registers(int registers);
void pin(const void* registers, size_t bytes, bool is_after_wait);
void begin();
void wait(int pending);
void wait_over();
struct Product {
  float* c;
  int columns;
  const uint32_t* a_registers;  // or null, then:
  uint64_t a, b;
  bool accumulate, is_bfloat16;
};
void product(Product product);
inline bool is_bfloat16(__half) { return false; }
inline bool is_bfloat16(__nv_bfloat16) { return true; }
}  // namespace emulated

template <int registers>
void registers_release() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
  emulated::set_registers(registers);
}
template <int registers>
void registers_take() {
  registers_release<registers>();
}

template <typename... Registers>
void products_begin(Registers&... registers) {
  emulated::begin();
  (emulated::pin(registers, sizeof(registers), false), ...);
}
void products_commit();
template <int pending, typename... Registers>
void products_wait(Registers&... registers) {
  emulated::wait(pending);
  (emulated::pin(registers, sizeof(registers), true), ...);
  emulated::wait_over();
}

template <size_t N, typename Element>
void product(float (&c)[N], uint64_t a, uint64_t b, bool accumulate, Element element) {
  static_assert(N == 48 || N == 64);
  emulated::product({c, 2 * N, nullptr, a, b, accumulate, emulated::is_bfloat16(element)});
}
template <size_t N, typename Element>
void product(float (&c)[N], const uint32_t* a, uint64_t b, bool accumulate, Element element) {
  static_assert(N == 32 || N == 40 || N == 64);
  emulated::product({c, 2 * N, a, 0, b, accumulate, emulated::is_bfloat16(element)});
}

}  // namespace gafext::cuda
