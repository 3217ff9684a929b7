// The host's half: in place of csrc/cpu's kernels, calls to the Arm process. It is compiled after all of csrc/ops, in
// one source, and exports what tests/emulated_arm.py calls.
#include <string.h>
#include <unistd.h>

#include <stdexcept>

#include "shared.h"

namespace gafext {
namespace {

Call* arena = nullptr;
int requests = -1, replies = -1;

template <typename Args>
int64_t call_arm(const char* kernel, const Args& args) {
  static_assert(sizeof(args) <= sizeof(arena->args));
  strcpy(arena->kernel, kernel);
  memcpy(arena->args, &args, sizeof(args));
  char byte = 0;
  if (write(requests, &byte, 1) != 1 || read(replies, &byte, 1) != 1) {
    throw std::runtime_error(std::string(kernel) + ": the Arm process has ended");
  }
  return arena->result;
}

}  // namespace

namespace portable {  // as the host's dispatch calls them

#define KERNEL(result, name, Args) \
  result name(const Args& args) { return static_cast<result>(call_arm(#name, args)); }
GAFEXT_KERNELS

}  // namespace portable
}  // namespace gafext

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int open_arena(int file) { return (gafext::arena = map_arena(file)) != nullptr; }

EXPORT void call_process(int requests, int replies) { gafext::requests = requests, gafext::replies = replies; }
