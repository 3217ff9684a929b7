"""What the CUDA compiler says of every kernel: nothing spilled, no stack frame, and so no local memory."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT

SOURCES = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: nothing compiles the kernels")
# Of ptxas -v, one block per kernel.
REPORT = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def architectures(source: Path) -> tuple[str, ...]:
    return ("90a",) if "sm90" in source.stem else ("80", "90a")


def compile_kernels(source: Path, folder: Path) -> subprocess.CompletedProcess:
    """One source for all its architectures at once."""
    targets = [word for a in architectures(source) for word in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    options = ["-std=c++17", "-O3", "-DGAFEXT_WITH_CUDA", "-DGAFEXT_WITH_SM90A", "-Xptxas", "-v"]
    command = [NVCC, *options, *targets, "-fatbin", str(source), f"-odir={folder}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """[(source, kernel, architecture, stack bytes, spill stores, spill loads, registers)]"""

    folder = tmp_path_factory.mktemp("kernels")  # here: two threads that make a worker's first one delete each other's

    def report(source):
        done = compile_kernels(source, folder)
        assert done.returncode == 0, f"{source.name}: {done.stderr}"
        found = REPORT.findall(done.stderr)
        assert {architecture for _, architecture, *_ in found} in (set(), set(architectures(source))), done.stderr
        return [(source.name, kernel, arch, *map(int, numbers)) for kernel, arch, *numbers in found]

    with ThreadPoolExecutor(2) as pool:
        return [line for lines in pool.map(report, sorted(SOURCES.glob("*.cu"))) for line in lines]


def test_every_operation_has_kernels(reports):
    code = "".join(path.read_text() for path in (SOURCES.parent / "ops").iterdir())
    operations = re.findall(r"cudaError_t ([a-z]+)\w*_cuda\(", code)
    assert {re.match("[a-z]+", source)[0] for source, *_ in reports} == set(operations) >= {"flash", "cross", "geglu"}


def test_nothing_is_spilled_and_nothing_lies_on_the_stack(reports):
    bad = [
        f"{source} {kernel} sm_{architecture}: {stack} bytes of stack, {stores} stored and {loads} loaded by spills"
        for source, kernel, architecture, stack, stores, loads, _ in reports
        if stack or stores or loads
    ]
    assert not bad, "\n".join(bad)


def test_a_spill_would_be_seen(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spill(float* x, int n) {\n"
        "  float kept[64];\n"
        "  for (int i = 0; i < 64; ++i) kept[i] = x[i * n];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < n; ++i) x[i] = kept[i % 64];\n"
        "}\n"
    )
    done = compile_kernels(source, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [int(stack) >= 256 for _, _, stack, *_ in REPORT.findall(done.stderr)] == [True, True]


CALLER = """
#include "hopper.cuh"
int main() {
  gafext::cuda::TensorMap map;
  const uint64_t extents[4] = {64, 1, 1, 1}, strides[3] = {128, 128, 128};
  return gafext::cuda::encode_tensor_map(map, nullptr, true, extents, strides, 64, 64) != cudaSuccess;
}
"""
# As in a thread that has neither launched nor allocated: the driver has no context until cudaSetDevice.
DRIVER = """
#include <cuda.h>
#include <cuda_runtime_api.h>
static bool has_context = false;
static CUresult encode(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                       const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return has_context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
extern "C" {
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  *function = reinterpret_cast<void*>(&encode);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return has_context = true, cudaSuccess; }
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
}
"""


def test_a_tensor_map_is_encoded_also_in_a_thread_that_has_no_context_yet(tmp_path):
    (tmp_path / "caller.cu").write_text(CALLER)
    (tmp_path / "driver.cpp").write_text(DRIVER)
    command = [NVCC, "-std=c++17", "-cudart", "none", f"-I{SOURCES}", "caller.cu", "driver.cpp", "-o", "caller"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([tmp_path / "caller"]).returncode == 0
