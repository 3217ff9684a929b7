"""How a process on the CPU treats the memory that networks free."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TypeVar

from gafext import _C

T = TypeVar("T")


@functools.cache
def keep_freed_memory() -> None:
    """Let malloc keep what tensors free, for the tensors that come after them; a U-Net calls it on a CPU.

    glibc's default maps every block above some size anew from the kernel: a U-Net of Stable Diffusion's size then takes
    640 thousand page faults a forward pass, and 1.15 to 1.25 times as long. It is a setting of the whole process, for
    blocks of up to 32 MiB in the main thread; `GAFEXT_KEEP_MEMORY=0` in the environment leaves malloc alone.
    """
    if os.environ.get("GAFEXT_KEEP_MEMORY", "1") != "0":
        _C.keep_freed_memory()


def release_freed_memory() -> None:
    """Give back to the system what malloc has kept."""
    _C.release_freed_memory()


def release_afterwards(method: Callable[..., T]) -> Callable[..., T]:
    """A method of something with a device that gives back what malloc has kept on the CPU, also when it raises."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        finally:
            if self.device.type == "cpu":
                release_freed_memory()

    return wrapped
