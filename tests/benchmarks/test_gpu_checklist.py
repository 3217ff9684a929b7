"""The flow of benchmarks/gpu_checklist.sh, with a python3 and a compute-sanitizer that do what the test says."""

import os
import re
import shutil
import stat
import subprocess

import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("bash") or not shutil.which("timeout"), reason="needs bash, timeout")

# Notes what it was asked for. FAIL and SLOW name words of commands that fail, or take their time.
PYTHON = r"""#!/bin/bash
arguments="$*"
echo "${arguments//$'\n'/ }" >>"$NOTES"
case "$*" in
  *get_device_properties*) [ "$FAIL" = gpu ] && exit 1; echo "90 NVIDIA-H100-80GB-HBM3"; exit ;;
  *ops.__all__*) echo "--op cross_view_attention --op geglu"; exit ;;
  *"import xdist"*) exit 1 ;;
  *"pip install"*) echo "$CUDAARCHS $GAFEXT_CUDA" >>"$NOTES" ;;
esac
while [ $# -gt 0 ]; do [ "$1" = --json ] && echo '{}' >"$2"; shift; done
[ -n "$SLOW" ] && [[ $arguments == *$SLOW* ]] && sleep 20
echo "line before the last"
if [ -n "$FAIL" ] && [[ $arguments == *$FAIL* ]]; then echo "went wrong"; exit 3; fi
echo "went well"
"""
SANITIZER = """#!/bin/bash
echo "sanitizer $* with ${GAFEXT_CUDA_ATTENTION:-all}" >>"$NOTES"
while [ "$1" != python3 ]; do shift; done
"$@"
"""


WITHOUT_GPU = ("cuda/test_emulator", "cuda/test_build", "bench/test_bench_gpu")


@pytest.fixture
def checklist(tmp_path):
    """Runs the script in a copy of what it looks at; gives (exit status, output, commands, folder of results)."""
    for folder in ("benchmarks", "tests/ops", "tests/cuda", "tests/bench", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/gpu_checklist.sh", tmp_path / "benchmarks")
    for name in ("helpers", "ops/test_a", "cuda/test_device", *WITHOUT_GPU):
        (tmp_path / f"tests/{name}.py").write_text('DEVICES = ["cpu", "cuda"]\n')
    (tmp_path / "tests/ops/test_b.py").write_text("@on_devices\n")
    (tmp_path / "tests/ops/test_c.py").write_text("nothing for a GPU\n")
    for name, text in (("python3", PYTHON), ("compute-sanitizer", SANITIZER)):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    notes, out = tmp_path / "notes", tmp_path / "out"

    def run(*, fail="", slow="", seconds="575", sanitizer=True):
        if not sanitizer:
            (tmp_path / "bin/compute-sanitizer").unlink()
        notes.write_text("")
        given = {"NOTES": str(notes), "FAIL": fail, "SLOW": slow, "CHECKLIST_SECONDS": seconds}
        done = subprocess.run(
            ["bash", "benchmarks/gpu_checklist.sh", str(out)],
            cwd=tmp_path,
            env={**os.environ, **given, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr, notes.read_text(), out

    return run


STEPS = ["build", "info", "hopper", "tests", "memcheck", "racecheck", "card", "attention", "others"]
BEFORE = STEPS[: STEPS.index("card")]
STEPS += ["attention-mma", "unet", "float16", "pipeline", "lengths", "samplers"]


def test_all_steps_run_in_their_order(checklist):
    status, output, commands, out = checklist()
    assert status == 0, output
    assert [line.split()[1].strip(",") for line in output.splitlines() if line.startswith("ok")] == STEPS
    assert "all steps succeeded" in output.splitlines()[-1]
    assert "90-real ON" in commands
    (tested,) = [line for line in commands.splitlines() if "-m pytest" in line and "not hopper" in line]
    assert re.findall(r"\S+\.py", tested) == ["tests/cuda/test_device.py", "tests/ops/test_a.py", "tests/ops/test_b.py"]
    assert "not cuda_kernel" in tested
    sanitized = [line.split() for line in commands.splitlines() if line.startswith("sanitizer")]
    assert {(words[2], words[-1]) for words in sanitized} == {("memcheck", "all"), ("racecheck", "mma")}
    assert "--op cross_view_attention --op geglu --seconds" in commands
    files = sorted(path.name for path in out.iterdir())
    assert len(files) == 10 and "attention-bfloat16-NVIDIA-H100-80GB-HBM3.json" in files
    summary = commands.splitlines()[-1]
    assert "summary.py" in summary and all(
        name in summary for name in files if name.endswith("json") and "card" not in name
    )
    assert "verify_card.py --passed build info hopper tests memcheck racecheck --failed --json" in commands
    log = (out / "checklist.log").read_text()
    assert [line.split()[1].strip(",") for line in log.splitlines() if line.startswith("== ")] == STEPS


@pytest.mark.parametrize(
    "word, steps",
    [
        ("-m pytest", "hopper tests"),
        ("flash_attention", "attention attention-mma"),
        ("sanitize.py", "memcheck racecheck"),
    ],
)
def test_a_failure_is_named_and_the_others_run(checklist, word, steps):
    status, output, commands, _ = checklist(fail=word)
    assert status == 1
    assert output.splitlines()[-1] == f"failed: {steps}"
    card = next(line for line in commands.splitlines() if "verify_card.py" in line)
    assert card.split("--failed ")[1].split("--json")[0].split() == [step for step in steps.split() if step in BEFORE]
    assert "    went wrong" in output and "summary.py" in commands and "unet" in commands


def test_without_hoppers_kernel_the_others_are_measured(checklist):
    status, output, commands, _ = checklist(fail="-k hopper")
    assert status == 1 and output.splitlines()[-1] == "failed: hopper"
    sanitized = [line.split() for line in commands.splitlines() if line.startswith("sanitizer")]
    assert {(words[2], words[-1]) for words in sanitized} == {("memcheck", "mma"), ("racecheck", "mma")}


def test_a_step_over_its_time_is_stopped(checklist):
    status, output, commands, _ = checklist(slow="info", seconds="6")
    assert status == 1 and "TIME   info" in output
    assert "no time is left" in output and "summary.py" not in commands.splitlines()[0]
    assert output.splitlines()[-1].startswith("failed: info hopper tests")


def test_without_a_build_nothing_runs(checklist):
    status, output, commands, _ = checklist(fail="pip install")
    assert status == 1 and "FAILED build" in output and "gafext info" not in commands


def test_without_a_gpu(checklist):
    status, output, _, out = checklist(fail="gpu")
    assert status == 1 and output.strip() == "no GPU that PyTorch can use" and not list(out.iterdir())


@pytest.mark.skipif(os.path.exists("/usr/local/cuda/bin/compute-sanitizer"), reason="it is on this machine")
def test_without_a_sanitizer_one_line_says_so(checklist):
    status, output, _, _ = checklist(sanitizer=False)
    assert status == 0, output
    assert "absent memcheck, racecheck: this machine has no compute-sanitizer" in output
