"""Freed memory stays with a process that runs networks on the CPU, and goes back after a pipeline's run."""

import os
import subprocess
import sys

import pytest

import gafext
from gafext import _C
from gafext.ops import memory

SCRIPT = """
import resource, torch
from gafext.ops import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(4 << 20) for _ in range(4)]  # four times 16 MiB, made and freed: more than malloc keeps of its own
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
memory.keep_freed_memory()
# Aligned blocks leave splinters, so that the next ones may not fit where others were freed; how often, the heap says.
kept = min(faults() for _ in range(32))
memory.release_freed_memory()
print(default, kept, faults())
"""


def page_faults():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in result.stdout.split()]


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="glibc"
)
def test_freed_memory_is_kept_until_it_is_released():
    first, kept, released = page_faults()
    assert kept < 100 < min(first, released)


@pytest.mark.parametrize("setting, calls", [("0", 0), ("1", 1), (None, 1)])
def test_the_environment_decides(monkeypatch, setting, calls):
    called = []
    monkeypatch.setattr(_C, "keep_freed_memory", lambda: called.append(1))
    monkeypatch.delenv("GAFEXT_KEEP_MEMORY", raising=False)
    if setting is not None:
        monkeypatch.setenv("GAFEXT_KEEP_MEMORY", setting)
    memory.keep_freed_memory.__wrapped__()
    assert len(called) == calls


def test_a_pipeline_gives_it_back_also_when_it_fails(pipe, monkeypatch):
    called = []
    monkeypatch.setattr(_C, "release_freed_memory", lambda: called.append(1))
    options = {"num_views": 1, "num_inference_steps": 1, "progress_bar": False}
    pipe(gafext.PORTRAIT, **options)
    assert called == [1]
    with pytest.raises(ValueError):
        pipe(gafext.PORTRAIT, guidance_scale=0.0, **options)
    assert called == [1, 1]
