"""Description of the machine, the versions and the build, and the load of other processes during a measurement.

By default, glibc returns a large block to the operating system when it is freed, and the next tensor of that size
causes page faults again; `gafext.ops.memory.keep_freed_memory` makes it keep the blocks.
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

from gafext.versions import versions

QUIET = 0.05  # share of the cores that others may use before times are no longer trustworthy
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


def environment(device: str) -> dict:
    """Describe everything that is needed to judge or repeat the numbers."""
    from gafext import _C  # here: `gafext doctor` describes machines on which it does not load

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
    """Return its size in bytes; 64 MiB if the system does not report it."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((1024 * int(size[:-1]) for size in sizes if re.fullmatch(r"\d+K", size)), default=64 << 20)


def cold_bytes(device: str) -> int:
    """Return the total size of the inputs of cold calls, of which no replacement policy keeps a part in the cache."""
    # Twice the cache on GPUs, whose L2 consists of two halves.
    return int(last_level_cache(device) * (2 if device == "cuda" else 1.25))


def watch_others() -> Callable[[], float | None]:
    """Return a function that gives the share of the cores that others have used since this call.

    Others are other processes and the host of a virtual machine. Above QUIET, times are not reliable: the threads of a
    kernel wait for the one that is interrupted.
    """
    start = _cpu_seconds()

    def share() -> float | None:
        now = _cpu_seconds()
        if start is None or now is None:
            return None
        everyone, own, elapsed = (after - before for after, before in zip(now, start, strict=True))
        return min(1.0, max(0.0, everyone - own) / ((os.cpu_count() or 1) * max(elapsed, 0.01)))

    return share


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Return the CPU seconds of all processes and of this one, and the time; None if the system does not report it."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    everyone = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return everyone, time.process_time(), time.perf_counter()
