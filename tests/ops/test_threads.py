"""The kernels leave the threads of the process as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os
import torch
import gafext.ops

torch.set_num_threads(4)

def heads(batch, length, count):
    return torch.randn(batch, length, count, 64).transpose(1, 2)

def threads_after(*sizes):
    x = heads(*sizes)
    torch.ops.gafext.flash_attention(x, x, x)
    return set(os.listdir("/proc/self/task"))

def threads_across_views():
    x = heads(4, 260, 1)
    torch.ops.gafext.cross_view_attention(x, x, x, 4)
    return set(os.listdir("/proc/self/task"))

first = threads_after(4, 256, 16)
later = [threads_after(3, 96, 1) | threads_after(4, 256, 16) | threads_across_views() for _ in range(8)]
print(torch.get_num_threads(), len(set.union(*later) - first))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of threads")
def test_small_work_ends_no_thread():
    """libgomp ends the threads that a team smaller than the last one leaves out; the next large one starts others."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["4", "0"]


IN_A_THREAD = """
import os, threading
import torch
import gafext.ops

torch.set_num_threads(1)
x = torch.randn(2, 4, 600, 64)

def count():
    return len(os.listdir("/proc/self/task"))

def run():
    torch.ops.gafext.flash_attention(x, x, x)
    print(count())

before, thread = count(), threading.Thread(target=run)
thread.start()
thread.join()
print(before + 1)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of threads")
def test_a_python_thread_has_the_number_of_threads_that_was_set():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # what the thread would have without torch's word
    result = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD], env=environment, capture_output=True, text=True, check=True
    )
    during, expected = result.stdout.split()
    assert during == expected
