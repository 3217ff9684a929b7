// float2, uint4 and the like, with CUDA's alignment.
#pragma once

#define GAFEXT_VECTORS(element, name)                                                                  \
  struct name##1 { element x; };                                                                       \
  struct alignas(2 * sizeof(element)) name##2 { element x, y; };                                       \
  struct alignas(4 * sizeof(element) < 16 ? 4 * sizeof(element) : 16) name##4 { element x, y, z, w; }; \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; }                               \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }
GAFEXT_VECTORS(unsigned, uint)
GAFEXT_VECTORS(float, float)
#undef GAFEXT_VECTORS
