"""Freed memory stays with a process that runs networks on the CPU, and goes back after a pipeline's run."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from gafext import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(6 << 20)  # 24 MiB, made and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults(), faults()
memory.keep_freed_memory()
for _ in range(4):  # aligned blocks leave splinters, so that the first ones do not fit where one was freed
    faults()
kept = faults()
memory.release_freed_memory()
print(*default, kept, faults())
"""


def page_faults(**environment):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in result.stdout.split()]


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="glibc"
)
def test_freed_memory_is_kept_until_it_is_released():
    first, second, kept, released = page_faults()
    assert kept < 100 < min(first, second, released)
    assert min(page_faults(GAFEXT_KEEP_MEMORY="0")) > 100
