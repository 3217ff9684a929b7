// The Arm half: runs what host.cpp asks for, through the dispatch of csrc/cpu. Without arguments it says what it has.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <exception>

#define GAFEXT_WITHOUT_TORCH
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/ops/conv3x3.h"
#include "../../csrc/ops/conv3x3_int8.h"
#include "../../csrc/ops/cross_view_attention.h"
#include "../../csrc/ops/flash_attention.h"
#include "../../csrc/ops/geglu.h"
#include "../../csrc/ops/group_norm_silu.h"
#include "../../csrc/ops/linear.h"
#include "../../csrc/ops/linear_int8.h"
#include "shared.h"

namespace gafext {

#define KERNEL(result, name, Args) GAFEXT_CPU_KERNEL(result, name, const Args& args)
GAFEXT_KERNELS  // KERNEL(void, geglu, GegluArgs) ...
#undef KERNEL

    template <typename Args, typename Kernel>
    int64_t run(const Kernel& kernel, const Call& call) {
  Args args;
  memcpy(&args, call.args, sizeof(args));
  if constexpr (__is_same(decltype(kernel(args)), void)) {
    kernel(args);
    return 0;
  } else {
    return kernel(args);
  }
}

void serve(Call& call, int requests, int replies) {
  for (char byte; read(requests, &byte, 1) == 1;) {
#define KERNEL(result_type, name, Args) \
  if (strcmp(call.kernel, #name) == 0) call.result = run<Args>(cpu::name, call);
    GAFEXT_KERNELS
    if (write(replies, &byte, 1) != 1) return;
  }
}

}  // namespace gafext

int main(int argc, char** argv) {
  try {
    const char* name = gafext::name_of(gafext::instruction_set());
    if (argc != 4) return printf("%s\n%s\n%d\n", name, gafext::int8_products(), gafext::multiplies_bfloat16()) < 0;
  } catch (const std::exception& error) {
    return fprintf(stderr, "%s\n", error.what()), 1;
  }
  Call* call = map_arena(atoi(argv[1]));
  if (call == nullptr) return perror("no memory at the host's address"), 1;
  gafext::serve(*call, atoi(argv[2]), atoi(argv[3]));
}
