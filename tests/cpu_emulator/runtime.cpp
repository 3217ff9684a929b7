// csrc/cpu/runtime.cpp for emulated processors. What they have is set by tests/emulated_cpu.py.
#include <stdint.h>

#define has_vnni real_has_vnni
#define has_amx_int8 real_has_amx_int8
#define multiplies_bfloat16 real_multiplies_bfloat16
#define multiplies_pairs real_multiplies_pairs
#include "../../csrc/cpu/runtime.cpp"
#undef has_vnni
#undef has_amx_int8
#undef multiplies_bfloat16
#undef multiplies_pairs

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int64_t emulated_tile_products = 0;
EXPORT int emulated_vnni = 0;
EXPORT int emulated_tiles = 0;
EXPORT int emulated_bfloat16 = 0;

namespace gafext {

bool has_vnni() { return emulated_vnni != 0; }
bool has_amx_int8() { return emulated_tiles != 0; }
bool multiplies_bfloat16() { return emulated_bfloat16 != 0; }
bool multiplies_pairs() { return emulated_bfloat16 != 0; }

}  // namespace gafext
