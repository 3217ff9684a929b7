"""Runs the CPU kernels for Arm, cross-compiled, in a process under qemu-user; the operations stay on this machine.

    GAFEXT_EMULATED_CPU=neon pytest tests/ops/test_linear_int8.py      (neon, neon_sdot)

runs tests with each operation of gafext on that processor; tests/conftest.py calls `emulate_all`. The two processes
share memory at the same address: csrc/ops checks its tensors and fills the arguments of a kernel as ever, and where
it calls csrc/cpu, the Arm process runs the kernel on them.
"""

import concurrent.futures
import ctypes
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulator_build import ROOT, cache_folder, call, compiler_version, hash_of, once

CSRC, MACHINE = ROOT / "csrc", ROOT / "tests/arm_emulator"
PROCESSORS = {"neon": "cortex-a57", "neon_sdot": "max"}  # as qemu names one without and one with FEAT_DotProd
_ARM_COMPILER, _QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
_FLAGS = ["-std=c++20", "-fvisibility=hidden", "-fno-gnu-unique", "-w"]
_ARM_FLAGS = [*_FLAGS, "-O2", "-fopenmp", "-ffp-contract=fast", "-DGAFEXT_ISA=neon"]
_NAMESPACE = "gafext_arm"  # of the operations

needs_arm = pytest.mark.skipif(
    compiler_version() < 12 or not shutil.which(_ARM_COMPILER) or not shutil.which(_QEMU),
    reason=f"kernels for Arm take g++ 12, {_ARM_COMPILER} (g++-aarch64-linux-gnu) and {_QEMU} (qemu-user)",
)


class OnArm:
    """An operation of csrc/ops whose kernels run on an emulated Arm processor, called like torch.ops.gafext's."""

    def __init__(self, name: str, processor: str):
        self._op, self._pipes = getattr(_host().ops, name), _start(processor)

    def __call__(self, *args, **options):
        dll = _host().dll
        dll.call_process(*self._pipes)
        dll.begin_sharing()
        try:
            shared = [_copy(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            out = self._op(*shared, **options)
        finally:
            dll.end_sharing()
        return _copy(out)


def build_arm() -> Path:
    """The Arm process's program."""
    key = hash_of(_version(_ARM_COMPILER), *_ARM_FLAGS, _kernels(), *_texts(CSRC, MACHINE))
    sources = [MACHINE / "guest.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]

    def make(out):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: _compile_for_arm(source, key), sources))
        call([_ARM_COMPILER, "-static", "-fopenmp", *objects, "-o", out])

    return once(cache_folder() / f"kernels-{key}.arm", make)


def run_arm(processor: str, **environment: str) -> subprocess.CompletedProcess:
    """Have the program say what it found: the instruction set, the integer products, and bfloat16's."""
    command = [_QEMU, "-cpu", PROCESSORS[processor], build_arm()]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


class _Host:
    """The operations of this machine, and the memory that it shares."""

    def __init__(self):
        library = _build_host()
        torch.ops.load_library(library)
        self.dll, self.ops = ctypes.CDLL(str(library)), getattr(torch.ops, _NAMESPACE)
        self.file = os.memfd_create("gafext-arm")
        os.ftruncate(self.file, 1 << 30)
        assert self.dll.open_arena(self.file), "no memory at the address that is shared"


_host = functools.cache(_Host)


@functools.cache
def _start(processor: str) -> tuple[int, int]:
    """Start the Arm process; returns where to write requests and read replies. It ends with this process."""
    (requests, to), (from_, replies) = os.pipe(), os.pipe()
    fds = _host().file, requests, replies
    command = [_QEMU, "-cpu", PROCESSORS[processor], build_arm(), *map(str, fds)]
    subprocess.Popen(command, pass_fds=fds)
    os.close(requests)
    os.close(replies)
    return to, from_


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the same strides, and of what lies between. It is no operation of PyTorch's, which tests look for."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    if tensor.numel():
        span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        ctypes.memmove(copy.data_ptr(), tensor.data_ptr(), span * tensor.element_size())
    return copy


def _kernels() -> str:
    """Every kernel of csrc/ops, as KERNEL(result, name, arguments)."""
    found = [
        match
        for path in sorted((CSRC / "ops").glob("*.cpp"))
        for match in re.findall(r"^GAFEXT_CPU_KERNEL\((\w+), (\w+), const (\w+)& args\)", path.read_text(), re.M)
    ]
    return " ".join(f"KERNEL({', '.join(match)})" for match in found)


def _compile_for_arm(source: Path, key: str) -> Path:
    command = [_ARM_COMPILER, *_ARM_FLAGS, f"-DGAFEXT_KERNELS={_kernels()}", "-c", source, "-o"]
    return once(cache_folder() / f"{source.stem}-{key}.arm.o", lambda out: call([*command, out]))


def _build_host() -> Path:
    operations = [path for path in sorted((CSRC / "ops").glob("*.cpp")) if (CSRC / "cpu" / path.name).exists()]
    text = "".join(f'#include "{path}"\n' for path in [*operations, MACHINE / "host.cpp"])
    torch_folder = Path(torch.__path__[0])
    defines = [f"-Dgafext={_NAMESPACE}", f"-DGAFEXT_KERNELS={_kernels()}"]
    flags = ["g++", *_FLAGS, "-O0", "-fPIC", "-fopenmp", *defines, f"-I{torch_folder / 'include'}"]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    key = hash_of(_version("g++"), torch.__version__, *flags, text, *_texts(CSRC, MACHINE))
    entry = once(cache_folder() / f"operations-{key}.cpp", lambda out: out.write_text(text))
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    objects = [
        once(
            cache_folder() / f"{source.stem}-{key}.host.o",
            lambda out, s=source, o=options: call([*flags, *o, "-c", s, "-o", out]),
        )
        for source, options in [(entry, stable), (MACHINE / "allocator.cpp", []), (CSRC / "cpu/runtime.cpp", [])]
    ]
    return once(
        cache_folder() / f"operations-{key}.so",
        lambda out: call(["g++", "-shared", "-fopenmp", *objects, *libraries, "-o", out]),
    )


def _texts(*folders: Path) -> list[str]:
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cpp")]
    return [path.read_text() for path in files if "cuda" not in path.parts]


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
