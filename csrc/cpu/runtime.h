// What the CPU kernels need of the machine: its instruction set, its threads, scratch memory.
//
// Compiled once, for the baseline processor. Nothing inline here: the kernels include this header in translation units
// built for AVX-512, and an inline function emitted there could be the copy that an older processor runs.
#pragma once

#include <cstdint>

namespace gafext {

enum class InstructionSet { kPortable, kAvx2, kAvx512, kAmx };  // in dispatch.h's order; kAmx: AVX-512 and AMX tiles

// The one that kernels run with: the best that this processor has, or the one that the environment variable
// GAFEXT_INSTRUCTION_SET names (portable, avx2, avx512, amx). Throws std::runtime_error if that is unknown or
// unsupported.
InstructionSet instruction_set();

// Whether the processor has instructions that multiply bfloat16 (AVX512_BF16, and as a rule AMX), which these kernels
// do not use and PyTorch's libraries do: matrix products in bfloat16 are then several times as fast there.
bool multiplies_bfloat16();

const char* name_of(InstructionSet set);

// The threads that a parallel region gets: what torch.set_num_threads said.
int64_t max_threads();

// Bytes of a core's L2 cache; 1 MiB where the system does not say.
int64_t l2_bytes();

// At least `floats` floats, aligned to 64 bytes, uninitialised, valid until the calling thread asks again. Kept between
// calls: malloc would take blocks of this size from the kernel, page by page, each time.
float* scratch(int64_t floats);

// From now on this process's malloc keeps freed blocks of any size. By default glibc maps the large ones from the
// kernel and gives them back on each free: at 256 page faults a MiB, a fifth of a U-Net's time. Does nothing without
// glibc.
void keep_freed_memory();

// What malloc has kept goes back to the kernel.
void release_freed_memory();

}  // namespace gafext
