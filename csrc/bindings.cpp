// The Python module: build_info() and malloc's settings. The operations register themselves, in csrc/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/runtime.h"

namespace gafext {
namespace {

// "a,b" -> ["a", "b"], "" -> []
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

pybind11::dict build_info() {
  using namespace pybind11::literals;
#ifdef GAFEXT_WITH_CUDA
  const pybind11::object cuda_compiler = pybind11::str("nvcc " GAFEXT_CUDA_COMPILER);
  constexpr bool cuda = true;
#else
  const pybind11::object cuda_compiler = pybind11::none();
  constexpr bool cuda = false;
#endif
#ifdef _OPENMP
  constexpr bool openmp = true;
#else
  constexpr bool openmp = false;
#endif
  return pybind11::dict(
      "version"_a = GAFEXT_VERSION, "torch"_a = TORCH_VERSION, "compiler"_a = GAFEXT_CXX_COMPILER, "openmp"_a = openmp,
      "instruction_sets"_a = split(GAFEXT_INSTRUCTION_SETS), "instruction_set"_a = name_of(instruction_set()),
      "multiplies_bfloat16"_a = multiplies_bfloat16(), "multiplies_float16"_a = multiplies_float16(),
      "bfloat16_pairs"_a = multiplies_pairs(), "zen"_a = zen(), "int8_products"_a = int8_products(), "cuda"_a = cuda,
      "cuda_compiler"_a = cuda_compiler, "cuda_architectures"_a = split(cuda ? GAFEXT_CUDA_ARCHITECTURES : ""));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gafext's compiled kernels. Importing it registers torch.ops.gafext.*";
  m.def("keep_freed_memory", &keep_freed_memory, "malloc keeps what is freed, until release_freed_memory().");
  m.def("release_freed_memory", &release_freed_memory, "What malloc has kept goes back to the system.");
  m.def("build_info", &build_info, "How this module was built, and the instruction set that its CPU kernels use.");
}

}  // namespace gafext
