// Lets PyTorch's tensors lie in the memory that an Arm process shares.
#include <c10/core/CPUAllocator.h>
#include <string.h>

#include "shared.h"

namespace {

class Arena final : public c10::Allocator {
 public:
  uint64_t used = sizeof(Call);

  c10::DataPtr allocate(size_t bytes) override {
    const uint64_t begin = (used + 63) / 64 * 64;
    used = begin + bytes;
    TORCH_CHECK(used <= kArenaBytes, "the memory shared with the Arm process is full");
    auto* memory = reinterpret_cast<void*>(kArenaAddress + begin);
    memset(memory, 0xff, bytes);  // NaN, for what is never written
    return {memory, memory, [](void*) {}, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void*) {};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};

Arena arena;
c10::Allocator* previous = nullptr;

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// New tensors lie in the arena from here on; what lay there before is overwritten.
EXPORT void begin_sharing() {
  arena.used = sizeof(Call);
  previous = c10::GetAllocator(c10::kCPU);
  c10::SetAllocator(c10::kCPU, &arena);
}

EXPORT void end_sharing() { c10::SetAllocator(c10::kCPU, previous); }
