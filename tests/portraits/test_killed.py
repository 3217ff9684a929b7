"""SIGKILL at random moments, one process and two: what is there stays, what is missing is made, no more is left."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image


@pytest.fixture
def people(tmp_path):
    folder = tmp_path / "people"
    folder.mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 255, (60, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def views(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*.png")}


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again(processes, checkpoint, people, tmp_path):
    out = tmp_path / "out"
    options = ["generate", people, "--model", checkpoint, "--device", "cpu", "--views", "2", "--steps", "2", "--quiet"]
    command = [sys.executable, ROOT / "tests" / "killing.py", out, 20, processes, processes, *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["codes"] == [0] * processes
    assert len(set(report["counts"])) > 2  # some were killed between two portraits
    assert sorted(path.name for path in out.iterdir()) == [str(index) for index in range(8)]
    assert views(out) == views(tmp_path / "warm")  # one process that was not interrupted


def test_two_commands_at_once_make_nothing_twice(checkpoint, people, tmp_path):
    options = ["generate", people, "--model", checkpoint, "--device", "cpu", "--views", "2", "--steps", "2", "--json"]
    command = [sys.executable, "-m", "gafext", *options, "--quiet", "--out", tmp_path / "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    events = [[json.loads(line) for line in each.communicate(timeout=300)[0].splitlines()] for each in started]
    made = [event["folder"] for each in events for event in each if event["event"] == "portrait"]
    assert sorted(made) == [str(tmp_path / "out" / str(index)) for index in range(8)]
    for each in events:
        assert each[-1]["made"] + each[-1]["left"] == each[0]["missing"]


def test_a_terminated_run_leaves_no_temporary_folder(checkpoint, people, tmp_path):
    options = ["generate", people, "--model", checkpoint, "--device", "cpu", "--views", "2", "--steps", "500", "--json"]
    command = [sys.executable, "-m", "gafext", *options, "--out", tmp_path / "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, env=env) as run:
        while json.loads(run.stdout.readline())["event"] != "progress":
            pass
        assert [path.name for path in (tmp_path / "out").iterdir()] != []
        run.terminate()
        assert run.wait(timeout=60) == 143
    assert list((tmp_path / "out").iterdir()) == []


def test_torchrun_shares_the_portraits(checkpoint, people, tmp_path):
    (people / "7.png").write_text("no picture")  # of the second process, whose failure the first one writes down
    options = ["generate", people, "--model", checkpoint, "--device", "cpu", "--views", "2", "--steps", "1", "--quiet"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "gafext"]
    command = [sys.executable, *launcher, *options, "--out", tmp_path / "out", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(event["made"] for event in events if event["event"] == "end") == [3, 4], done.stderr
    assert {event["rank"] for event in events} == {0, 1}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*map(str, range(7)), "failures.json"]
    failures = json.loads((tmp_path / "out" / "failures.json").read_text())["failures"]
    assert [failure["portrait"] for failure in failures] == [str(people / "7.png")]
