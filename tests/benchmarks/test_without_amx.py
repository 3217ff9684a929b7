"""benchmarks/without_amx.py, and what the processor is taken for without its tiles."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from gafext import _C

CPU = Path("/proc/cpuinfo")
SHOW = "from gafext import _C; i = _C.build_info(); print(i['instruction_set'], i['multiplies_bfloat16'])"
pytestmark = pytest.mark.skipif("GenuineIntel" not in CPU.read_text() if CPU.exists() else True, reason="needs Intel")


def test_the_command_runs_as_on_a_processor_without_amx():
    command = [sys.executable, "-c", SHOW]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/without_amx.py", *command], capture_output=True, text=True, check=True
    )
    has = _C.build_info()["instruction_set"]
    # Intel's AVX512_BF16 alone does not make bfloat16 faster than float32.
    assert done.stdout.split() == ["avx512" if has == "amx" else has, "False"]
    assert _C.build_info()["multiplies_bfloat16"] == (has == "amx")


def test_the_commands_exit_status_is_passed_on():
    command = [sys.executable, ROOT / "benchmarks/without_amx.py", sys.executable, "-c", "raise SystemExit(3)"]
    assert subprocess.run(command).returncode == 3
