// What the CPU kernels need of the machine: its instruction set, its threads, scratch memory.
//
// Compiled once, for the baseline processor. Nothing is inline here: the kernels include this header in translation
// units built for AVX-512, and the linker could keep an inline function's copy from there for an older processor.
#pragma once

#include <cstdint>

namespace gafext {

// In dispatch.h's order. kBaseline: portable, on Arm neon; kAmx: AVX-512 and AMX tiles.
enum class InstructionSet { kBaseline, kAvx2, kAvx512, kAmx };

// The one that the kernels run with: the best that this processor has, or the one that the environment variable
// GAFEXT_INSTRUCTION_SET names (portable, avx2, avx512, amx; on Arm neon). Throws std::runtime_error if that is unknown
// or unsupported.
InstructionSet instruction_set();

// Whether the processor multiplies bfloat16 faster than float32: with AVX512_BF16 and AMX, with AMD's AVX512_BF16, and
// with Arm's FEAT_BF16 on Linux. PyTorch's libraries then multiply bfloat16 matrices faster than kernels that multiply
// float32.
bool multiplies_bfloat16();

// Whether the kernels multiply pairs of bfloat16 by AVX512_BF16 (pairs.h), which this compiler's assembler must know.
bool multiplies_pairs();

// The generation of AMD's Zen, 4 or 5, if the kernels run with its AVX-512; else 0. PyTorch's MKL has nothing beyond
// AVX2 for AMD's processors: the kernels multiply large float32 matrices 1.0 to 1.2 times as fast on Zen 4, and 1.6 to
// 2.1 times on Zen 5, whose AVX-512 has twice AVX2's width.
int zen();

// Whether PyTorch's libraries multiply float16 matrices faster than float32 ones: with AVX512_FP16, and on Arm.
bool multiplies_float16();

// Whether the processor multiplies and adds 8-bit integers in one instruction, AVX512_VNNI, and may use it.
bool has_vnni();

// Whether the processor multiplies and adds four 8-bit integers in one instruction of NEON, FEAT_DotProd.
bool has_dot_products();

// Whether the kernels run with AMX and the processor multiplies 8-bit integers on its tiles.
bool has_amx_int8();

// What multiplies 8-bit integers, in words.
const char* int8_products();

const char* name_of(InstructionSet set);

// The threads that a parallel region gets: as set by torch.set_num_threads.
int64_t max_threads();

// Bytes of a core's L2 cache; 1 MiB where the system does not say.
int64_t l2_bytes();

// At least `floats` floats, aligned to 64 bytes, uninitialised, valid until the calling thread's next call. Kept
// between calls: malloc would take blocks of this size from the kernel, page by page, each time.
float* scratch(int64_t floats);

// From now on this process's malloc keeps freed blocks below 32 MiB. By default glibc maps the larger of them from the
// kernel and gives them back on each free: at 256 page faults per MiB, a fifth of a U-Net's time. Does nothing without
// glibc.
void keep_freed_memory();

// Gives back to the kernel what malloc has kept.
void release_freed_memory();

}  // namespace gafext
