"""Peak memory of a piece of work: of the process on CPUs, of torch's allocator on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


@dataclass
class Peak:
    """Bytes in use before some work, and at most while it ran; None where the system does not say."""

    before: int = 0
    bytes: int | None = None

    @property
    def above(self) -> int | None:
        """The largest addition to what was in use before."""
        return None if self.bytes is None else max(0, self.bytes - self.before)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the work in this context: CUDA, and CPUs under Linux.

    Args:
        device: device of the work. On CPUs it is the process that is measured, with all its libraries; its high-water
            mark, like that of CUDA's allocator, starts anew.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak.before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
    elif device.type == "cpu" and _reset_high_water_mark():
        peak.before = _status("VmRSS")
        yield peak
        peak.bytes = _status("VmHWM")
    else:
        yield peak


def _reset_high_water_mark() -> bool:
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:  # not Linux, or a sandbox
        return False
    return True


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in (_PROCESS / "status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
