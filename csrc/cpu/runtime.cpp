#include "runtime.h"

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../ops.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gafext {
namespace {

bool supported(InstructionSet set) {
#ifdef GAFEXT_X86
  __builtin_cpu_init();  // the queries below cover the operating system's support too
  switch (set) {
    case InstructionSet::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             supported(InstructionSet::kAvx2);
    case InstructionSet::kAvx2:  // every processor with AVX2 and FMA has F16C, which older compilers cannot ask for
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case InstructionSet::kPortable:
      return true;
  }
#endif
  return set == InstructionSet::kPortable;
}

InstructionSet choose() {
  constexpr InstructionSet best_first[] = {InstructionSet::kAvx512, InstructionSet::kAvx2, InstructionSet::kPortable};
  const char* wanted = std::getenv("GAFEXT_INSTRUCTION_SET");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (InstructionSet set : best_first) {
    const bool named = !any && std::string(wanted) == name_of(set);
    if ((any || named) && supported(set)) return set;
    if (named) {
      throw std::runtime_error("GAFEXT_INSTRUCTION_SET=" + std::string(wanted) +
                               ": this processor or this build has no such kernels");
    }
  }
  throw std::runtime_error("GAFEXT_INSTRUCTION_SET=" + std::string(wanted) + ": must be portable, avx2 or avx512");
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

int64_t max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  if (floats > capacity) {
    capacity = 0;
    memory.reset();
    void* block = nullptr;
    if (posix_memalign(&block, 64, static_cast<size_t>(floats) * sizeof(float)) != 0) throw std::bad_alloc();
    memory.reset(static_cast<float*>(block));
    capacity = floats;
  }
  return memory.get();
}

// One definition of each operation: it hands over to the copy of the kernel that was compiled for this processor.
#ifdef GAFEXT_X86
#define GAFEXT_FOR_THIS_PROCESSOR(op, Args)                            \
  namespace portable { void op(const Args&); }                         \
  namespace avx2 { void op(const Args&); }                             \
  namespace avx512 { void op(const Args&); }                           \
  void op##_cpu(const Args& args) {                                    \
    switch (instruction_set()) {                                       \
      case InstructionSet::kAvx512: return avx512::op(args);           \
      case InstructionSet::kAvx2: return avx2::op(args);               \
      case InstructionSet::kPortable: return portable::op(args);       \
    }                                                                  \
  }
#else
#define GAFEXT_FOR_THIS_PROCESSOR(op, Args)                            \
  namespace portable { void op(const Args&); }                         \
  void op##_cpu(const Args& args) { portable::op(args); }
#endif

GAFEXT_FOR_THIS_PROCESSOR(flash_attention, FlashAttentionArgs)
GAFEXT_FOR_THIS_PROCESSOR(cross_view_attention, CrossViewAttentionArgs)
GAFEXT_FOR_THIS_PROCESSOR(geglu, GegluArgs)

}  // namespace gafext
