#include "runtime.h"

#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#ifdef GAFEXT_X86
#include <cpuid.h>
#endif
#ifdef GAFEXT_AMX
#include <sys/syscall.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace gafext {
namespace {

#ifdef GAFEXT_AMX
constexpr unsigned kBfloat16Products = 1u << 22, kTiles = 1u << 24, kInt8Products = 1u << 25;

// Whether the processor has all of these features of AMX.
bool processor_has(unsigned features) {
  unsigned eax, ebx, ecx, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & features) == features;
}

// Tiles, their products in bfloat16, and the system's permission, which one request obtains for the whole process.
bool has_amx() {
  if (!processor_has(kTiles | kBfloat16Products)) return false;
#ifdef __linux__
  constexpr long kRequestState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#ifdef GAFEXT_X86
constexpr InstructionSet kBestFirst[] = {InstructionSet::kAmx, InstructionSet::kAvx512, InstructionSet::kAvx2,
                                         InstructionSet::kBaseline};
constexpr char kBaselineName[] = "portable", kNames[] = "portable, avx2, avx512 or amx";
#else
constexpr InstructionSet kBestFirst[] = {InstructionSet::kBaseline};
#ifdef __aarch64__
constexpr char kBaselineName[] = "neon", kNames[] = "neon, on this processor";
#else
constexpr char kBaselineName[] = "portable", kNames[] = "portable, on this processor";
#endif
#endif

bool supported(InstructionSet set) {
#ifdef GAFEXT_X86
  __builtin_cpu_init();  // the queries below cover the operating system's support too
  switch (set) {
    case InstructionSet::kAmx:
#ifdef GAFEXT_AMX
      return has_amx() && __builtin_cpu_supports("avx512bf16") && supported(InstructionSet::kAvx512);
#else
      return false;
#endif
    case InstructionSet::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             supported(InstructionSet::kAvx2);
    case InstructionSet::kAvx2:  // every processor with AVX2 and FMA has F16C, which older compilers cannot ask for
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case InstructionSet::kBaseline:
      return true;
  }
#endif
  return set == InstructionSet::kBaseline;
}

InstructionSet choose() {
  const char* wanted = std::getenv("GAFEXT_INSTRUCTION_SET");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (InstructionSet set : kBestFirst) {
    const bool named = !any && std::string(wanted) == name_of(set);
    if ((any || named) && supported(set)) return set;
    if (named) {
      throw std::runtime_error("GAFEXT_INSTRUCTION_SET=" + std::string(wanted) +
                               ": this processor or this build has no such kernels");
    }
  }
  throw std::runtime_error("GAFEXT_INSTRUCTION_SET=" + std::string(wanted) + ": must be " + kNames);
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

bool multiplies_bfloat16() {
#ifdef GAFEXT_X86
  // Intel's AVX512_BF16 multiplies no faster than float32: without tiles, PyTorch's products of bfloat16 have half of
  // float32's speed on a Sapphire Rapids.
  const InstructionSet set = instruction_set();
  const bool pays = set == InstructionSet::kAmx || (set == InstructionSet::kAvx512 && !__builtin_cpu_is("intel"));
  return pays && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kBfloat16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kBfloat16) != 0;
#else
  return false;
#endif
}

bool multiplies_pairs() {
#ifdef GAFEXT_BFLOAT16_PAIRS
  return instruction_set() == InstructionSet::kAvx512 && multiplies_bfloat16();
#else
  return false;
#endif
}

int zen() {
#ifdef GAFEXT_X86
  static const int generation = [] {    // a virtual machine takes microseconds for each cpuid
    constexpr unsigned kFamily = 0x19;  // of Zen 3 and 4, of which 4 has AVX-512; later ones have larger numbers
    unsigned eax, ebx, ecx, edx = 0;
    const bool has_avx512 = instruction_set() == InstructionSet::kAvx512;
    if (!has_avx512 || !__builtin_cpu_is("amd") || __get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return 0;
    return (eax >> 8 & 0xf) + (eax >> 20 & 0xff) > kFamily ? 5 : 4;
  }();
  return generation;
#else
  return 0;
#endif
}

bool multiplies_float16() {
#ifdef GAFEXT_X86
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned kFloat16 = 1u << 23;  // GCC 11 cannot ask for it by name
  return instruction_set() >= InstructionSet::kAvx512 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
         (edx & kFloat16) != 0;
#else
  return true;
#endif
}

bool has_vnni() {
#ifdef GAFEXT_X86
  return instruction_set() >= InstructionSet::kAvx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool has_dot_products() {
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP, which older headers lack
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}

bool has_amx_int8() {
#ifdef GAFEXT_AMX
  static const bool has = instruction_set() == InstructionSet::kAmx && processor_has(kInt8Products);
  return has;
#else
  return false;
#endif
}

const char* int8_products() {
  if (has_amx_int8()) return "AMX; AVX512_VNNI for few rows";
  if (has_vnni()) return "AVX512_VNNI";
  if (has_dot_products()) return "SDOT";
  if (instruction_set() >= InstructionSet::kAvx512) return "AVX-512, as 16 bits";
  if (instruction_set() == InstructionSet::kAvx2) return "AVX2, as 16 bits";
#ifdef __aarch64__
  return "NEON, as 16 bits";
#else
  return "plain C++";
#endif
}

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAmx:
      return "amx";
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    default:
      return kBaselineName;
  }
}

int64_t max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes >= 1 << 18) return bytes;
#endif
  return 1 << 20;
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

void keep_freed_memory() {
#ifdef __GLIBC__
  // Larger blocks are still mapped and given back: keeping them left holes, and a VAE took half as much memory again.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, -1);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

void release_freed_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

}  // namespace gafext
