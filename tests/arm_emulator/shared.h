// What tests/emulated_arm.py's two halves share: memory at the same address in both, so that the arguments of a kernel
// mean the same there, and the call that lies at its beginning.
#pragma once

#include <stdint.h>
#include <sys/mman.h>

constexpr uint64_t kArenaAddress = 1ull << 44;
constexpr uint64_t kArenaBytes = 1ull << 30;  // a file with holes: only what is touched takes memory

struct Call {
  char kernel[64];
  int64_t result;
  alignas(16) char args[512];
};

inline Call* map_arena(int file) {
  void* wanted = reinterpret_cast<void*>(kArenaAddress);
  void* got = mmap(wanted, kArenaBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0);
  return got == wanted ? static_cast<Call*>(got) : nullptr;
}
