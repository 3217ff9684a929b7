"""Runs the CPU kernels for AVX-512 and AMX on a processor with AVX2 alone: the very sources, over tests/cpu_emulator.

    GAFEXT_EMULATED_CPU=amx pytest tests/ops/test_linear_int8.py      (avx512, avx512_vnni, avx512_bf16, amx)

runs tests with each operation of gafext on that processor; tests/conftest.py calls `emulate_all`. An operation is
compiled when first called. Wrong results show, and uses of tiles that a processor would refuse; speed does not.
GAFEXT_EMULATED_FLAGS has further flags of the compiler, such as sanitizers (CONTRIBUTING.md).

A kernel that uses an instruction nobody else does needs its plain form in tests/cpu_emulator/instructions.h, or for
assembly a plain branch of its own where GAFEXT_EMULATOR is defined.
"""

import ctypes
import functools
import importlib
import os
import re
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from emulator_build import ROOT, cache_folder, call, compiler_version, hash_of, once

CSRC, MACHINE = ROOT / "csrc", ROOT / "tests/cpu_emulator"
# VNNI, 8-bit products on tiles, products of bfloat16
PROCESSORS = {"avx512": (0, 0, 0), "avx512_vnni": (1, 0, 0), "avx512_bf16": (1, 0, 1), "amx": (1, 1, 1)}
_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-gnu-unique", "-w",
          "-mavx2", "-mfma", "-mf16c", "-ffp-contract=fast"]  # fmt: skip
_FLAGS += os.environ.get("GAFEXT_EMULATED_FLAGS", "").split()
# portable: the copy that is called
_DEFINES = ["-DGAFEXT_ISA=portable", "-DGAFEXT_EMULATOR", "-DGAFEXT_BFLOAT16_PAIRS"]

needs_compiler = pytest.mark.skipif(
    compiler_version() < 12 or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="the emulator of CPU kernels takes g++ 12 or newer and AVX2",
)


class Emulated:
    """An operation of csrc/ops, called like torch.ops.gafext's."""

    def __init__(self, name: str, processor: str):
        namespace = "gafext_amx" if processor == "amx" else "gafext_avx512"  # one for each compilation
        library = _library(_operations()[name], namespace)
        torch.ops.load_library(library)
        self._dll = ctypes.CDLL(str(library))
        self._op, self._has = getattr(getattr(torch.ops, namespace), name), PROCESSORS[processor]

    def __call__(self, *args, **options):
        for name, value in zip(("emulated_vnni", "emulated_tiles", "emulated_bfloat16"), self._has, strict=True):
            ctypes.c_int.in_dll(self._dll, name).value = value
        return self._op(*args, **options)

    @property
    def tile_products(self) -> int:
        """How many products of two tiles there have been."""
        return ctypes.c_int64.in_dll(self._dll, "emulated_tile_products").value


def emulate_all(processor: str, emulated: type = Emulated) -> torch.library.Library:
    """Have torch.ops.gafext run on this processor, for as long as the result lives."""
    importlib.import_module("gafext.ops")  # registers what is overridden
    library = torch.library.Library("gafext", "IMPL")
    emulated = functools.cache(emulated)
    for name in _operations():
        kernel = functools.partial(_call, emulated, name, processor)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s)Warning only once.*Overriding a previously registered kernel")
            library.impl(name, kernel, "CPU", allow_override=True)
    return library


def _call(emulated, name: str, processor: str, *args: object) -> object:
    return emulated(name, processor)(*args)


@functools.cache
def _operations() -> dict[str, str]:
    """Names of the operations that have a CPU kernel, and of their files."""
    files = [path for path in sorted((CSRC / "ops").glob("*.cpp")) if (CSRC / "cpu" / path.name).exists()]
    schemas = (
        (path.stem, schema) for path in files for schema in re.findall(r'm\.def\(\s*"([^)]*)\)', path.read_text())
    )
    return {schema.split("(")[0]: stem for stem, schema in schemas if "*" not in schema}  # _call passes no options on


def _library(stem: str, namespace: str) -> Path:
    sources = [CSRC / "ops" / f"{stem}.cpp", MACHINE / "runtime.cpp", CSRC / "cpu" / f"{stem}.cpp"]
    headers = [*sorted(CSRC.rglob("*.h")), *sorted(MACHINE.iterdir()), CSRC / "cpu/runtime.cpp"]
    flags = [*_FLAGS, *_DEFINES, f"-Dgafext={namespace}", *(["-DGAFEXT_EMULATED_AMX"] if "amx" in namespace else [])]
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    texts = [path.read_text() for path in (*sources, *headers)]
    key = hash_of(version, torch.__version__, str(torch.__path__), *flags, *texts)
    torch_folder = Path(torch.__path__[0])
    includes = [f"-I{torch_folder / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    kernel = once(
        cache_folder() / f"{stem}-{key}.o",
        lambda out: call(["g++", *flags, "-include", MACHINE / "instructions.h", "-c", sources[-1], "-o", out]),
    )
    return once(
        cache_folder() / f"{stem}-{key}.so",
        lambda out: call(["g++", *flags, "-shared", *includes, *sources[:-1], kernel, *libraries, "-o", out]),
    )
