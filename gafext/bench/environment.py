"""On what it is measured: the machine, the versions, and glibc's malloc with and without its big blocks kept.

By default glibc gives a big block back to the kernel when it is freed, and the next tensor of that size is paged in
anew; `gafext.ops.memory.keep_freed_memory` makes it keep them.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gafext import _C
from gafext.versions import versions

QUIET = 0.05  # share of the cores that others may hold while times are still to be trusted
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


def environment(device: str) -> dict:
    """What a reader needs to judge or to repeat the numbers."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "gpu": gpu() if device == "cuda" else None,
        "last_level_cache_mib": last_level_cache(device) / 2**20,
        "versions": versions(),
        "build": _C.build_info(),
    }


def cpu() -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    present = flags[1].split() if flags else []
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in present],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
    }


def last_level_cache(device: str) -> int:
    """In bytes; 64 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((1024 * int(size[:-1]) for size in sizes if re.fullmatch(r"\d+K", size)), default=64 << 20)


def cold_bytes(device: str) -> int:
    """How much the inputs of cold calls must be in all: so much more than the cache holds that no replacement policy
    keeps a part of them; twice it on GPUs, whose L2 is made of two halves."""
    return last_level_cache(device) * (2 if device == "cuda" else 1.25)


def watch_others() -> Callable[[], float | None]:
    """A function that gives the share of the machine's cores that others have held since now: other processes, and the
    host of a virtual machine. Beyond QUIET, times say little: the threads of a kernel wait for the one that is held up.
    """
    start = _cpu_seconds()

    def share() -> float | None:
        if start is None:
            return None
        everyone, own, elapsed = (after - before for after, before in zip(_cpu_seconds(), start, strict=True))
        return min(1.0, max(0.0, everyone - own) / (os.cpu_count() * max(elapsed, 0.01)))

    return share


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Of all processes, of this one, and by the clock; None where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    everyone = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return everyone, time.process_time(), time.perf_counter()
