"""Compiles kernels and the machine of tests/cuda_emulator into a library for emulator.py.

What was compiled stays in a folder for temporary files, under the hash of all that it depends on.
"""

import concurrent.futures
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc/cuda"
MACHINE = ROOT / "tests/cuda_emulator"

# Of kernels: the thread sanitizer's hooks without its library, for cuda_emulator/memory.cpp has them, as it has
# memcpy, which would come without hooks; and no local variable that is 0 by chance.
HOOKS = [
    "-O1",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment",
    "-DGAFEXT_EMULATED_KERNEL",
    "-ftrivial-auto-var-init=pattern",
]
_FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off",
          "-U_FORTIFY_SOURCE", "-fno-gnu-unique", "-DGAFEXT_EMULATOR", "-DGAFEXT_WITH_CUDA"]  # fmt: skip
_INCLUDES = [MACHINE / "include", MACHINE, KERNELS, ROOT / "csrc"]


def compiler_version():
    """12 for g++ 12.2; 0 for none, and clang under that name is 4."""
    if not shutil.which("g++"):
        return 0
    return int(subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout.split(".")[0])


needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or compiler_version() < 12,
    reason="the emulator of CUDA kernels takes Linux and g++ 12 or newer",
)


class EmulatorError(RuntimeError):
    """What a kernel must not do."""


def cache_folder():
    folder = Path(tempfile.gettempdir()) / f"gafext-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is another user's"
    return folder


@functools.cache
def _common_hash():
    """Of compiler and headers."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    files = [p for folder in (MACHINE, ROOT / "csrc") for p in folder.rglob("*") if p.suffix in (".h", ".cuh")]
    content = [version, *_FLAGS, *HOOKS, str(ROOT), *(path.read_text() for path in sorted(files))]
    return hash_of(*content)


def hash_of(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def once(path, make):
    """`path`, made by make(temporary path) unless it is there; one process at a time."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            temporary = path.with_suffix(".part")
            make(temporary)
            temporary.rename(path)
    return path


def _compile(source, flags=()):
    # Headers beside the source come before all others: a mutated kernel may bring its own.
    beside = [path.read_text() for path in sorted(source.parent.glob("*.*h"))]
    key = hash_of(_common_hash(), str(source), source.read_text(), *flags, *beside)
    includes = [f"-I{folder}" for folder in _INCLUDES]
    command = ["g++", *_FLAGS, *flags, *includes, "-x", "c++", "-c", str(source), "-o"]
    return once(cache_folder() / f"{source.stem}-{key}.o", lambda out: call([*command, str(out)]))


def link(sources, entries):
    folder = cache_folder()
    entry = once(folder / f"entries-{hash_of(entries)}.cpp", lambda out: out.write_text(entries))
    parts = [(source, HOOKS) for source in sources]
    parts += [(source, ["-O2"]) for source in [entry, *sorted(MACHINE.glob("*.cpp"))]]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(lambda part: _compile(*part), parts)]
    library = folder / f"kernels-{hash_of(*objects)}.so"
    command = ["g++", "-shared", "-Wl,-Bsymbolic,-z,defs", *objects, "-o"]
    return once(library, lambda out: call([*command, str(out)]))


def call(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulatorError(f"{' '.join(map(str, command))}\n{done.stderr}")
