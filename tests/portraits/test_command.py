"""`gafext generate` of several portraits, in this process."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from small_checkpoints import save_lora

from gafext.cameras import orbit
from gafext.cli import main
from gafext.output import MultiViewOutput
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.portraits import command
from gafext.portraits.claim import Claim
from gafext.portraits.jobs import file_digest


@pytest.fixture
def people(tmp_path):
    folder = tmp_path / "people"
    folder.mkdir()
    for index, name in enumerate(("ann.png", "ben.jpg", "cleo.png")):
        pixels = np.random.default_rng(index).integers(0, 255, (60, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def generate(checkpoint, tmp_path):
    def run(*arguments) -> int:
        options = ["--model", checkpoint, "--out", tmp_path / "out", "--device", "cpu", "--views", 2]
        return main(["generate", *map(str, (*options, *arguments))])

    run.checkpoint = checkpoint
    return run


def snapshot(folder):
    return {path.relative_to(folder): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_portrait_gets_the_folder_that_it_gets_alone(generate, checkpoint, people, tmp_path, capsys):
    assert generate(people, "--steps", 2, "--seed", 3) == 0
    shown = capsys.readouterr()
    assert "3 of 3 portraits: 100%" in shown.err and "3 portraits in" in shown.out
    assert names(tmp_path / "out") == ["ann", "ben", "cleo"]
    alone = ["--model", checkpoint, "--out", tmp_path / "alone", "--device", "cpu", "--views", 2, "--quiet"]
    assert main(["generate", str(people / "ben.jpg"), "--steps", "2", "--seed", "3", *map(str, alone)]) == 0
    left, right = tmp_path / "alone", tmp_path / "out" / "ben"
    assert names(left) == names(right)
    for path in left.rglob("*"):
        if path.is_file() and path.name not in ("run.json", "index.html"):
            assert path.read_bytes() == (right / path.relative_to(left)).read_bytes(), path
    single, many = (json.loads((folder / "run.json").read_text()) for folder in (left, right))
    assert many.pop("portrait_sha256") and list(many.pop("inputs_sha256")) == ["model"]
    assert single.pop("command").keys() == many.pop("command").keys()
    assert single == many


def test_again_nothing_is_made_twice(generate, people, tmp_path, capsys, monkeypatch):
    assert generate(people, "--steps", 1, "--quiet") == 0
    shutil.rmtree(tmp_path / "out" / "ben")
    before = snapshot(tmp_path / "out")
    assert generate(people, "--steps", 1, "--quiet") == 0
    after = snapshot(tmp_path / "out")
    assert names(tmp_path / "out") == ["ann", "ben", "cleo"] and before.items() <= after.items()
    monkeypatch.setattr(MultiViewDiffusionPipeline, "from_pretrained", None)  # not even the model is loaded
    capsys.readouterr()
    assert generate(people, "--steps", 1) == 0
    assert "0 portraits in" in capsys.readouterr().out
    assert snapshot(tmp_path / "out") == after
    assert generate(people, "--steps", 2, "--quiet") == 1
    text = capsys.readouterr().err
    assert "out/ann: expected a result of the same portrait and options" in text and "--overwrite" in text
    assert snapshot(tmp_path / "out") == after


def test_again_with_an_infinite_level(generate, people, capsys):
    for made in (3, 0):
        assert generate(people, "--steps", 1, "--guidance-interval", 1, "inf") == 0
        assert f"{made} portraits in" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "taken"), [("cuda", "cuda:1"), ("cuda:0", "cuda:0")])
def test_each_process_takes_a_gpu_of_its_own(given, taken, generate, people, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = []

    def load(args):
        devices.append(args.device)
        raise KeyboardInterrupt

    monkeypatch.setattr("gafext.cli._load", load)
    generate(people, "--steps", 1, "--quiet", "--device", given)
    assert devices == [taken]


def test_other_cameras_in_the_same_file_are_refused(generate, people, tmp_path, capsys):
    path = tmp_path / "cameras.json"
    options = people, "--steps", 1, "--quiet", "--cameras", path, "--renders", tmp_path / "renders"
    (tmp_path / "renders").mkdir()
    for view in range(2):
        Image.new("RGB", (64, 64), "gray").save(tmp_path / "renders" / f"{view}.png")

    def write(elevation):
        frames = [{"transform_matrix": m} for m in orbit(2, elevation=elevation).opengl_c2w.tolist()]
        path.write_text(json.dumps({"camera_angle_x": 0.5, "frames": frames}))

    write(0)
    model = ["generate", "--model", str(generate.checkpoint), "--out", str(tmp_path / "out"), "--device", "cpu"]

    def run(*more):
        return main([*model, *map(str, (*options, *more))])

    assert run() == 0
    before = snapshot(tmp_path / "out")
    assert run() == 0 and snapshot(tmp_path / "out") == before
    write(20)
    assert run() == 1 and "got one with other cameras" in capsys.readouterr().err
    write(0)
    Image.new("RGB", (64, 64), "black").save(tmp_path / "renders" / "1.png")
    assert run() == 1 and "got one with other renders" in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == before
    assert run("--overwrite") == 0 and snapshot(tmp_path / "out") != before


def test_another_lora_in_the_same_file_is_refused(generate, people, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    options = people, "--steps", 1, "--quiet", "--lora", path
    save_lora(path)
    assert generate(*options) == 0
    before = snapshot(tmp_path / "out")
    assert generate(*options) == 0 and snapshot(tmp_path / "out") == before
    save_lora(path)
    assert generate(*options) == 1 and "got one with other lora" in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == before


def test_a_portrait_that_changes_or_goes_meanwhile(generate, people, tmp_path, monkeypatch, capsys):
    digest, read, save = file_digest(people / "cleo.png"), command.read_portrait, MultiViewOutput.save

    def read_and_change(path):
        picture = read(path)
        if path.stem == "ann":
            shutil.copy(people / "ben.jpg", path)
        return picture

    def remove_and_save(output, *args, **options):
        (people / "cleo.png").unlink(missing_ok=True)
        return save(output, *args, **options)

    monkeypatch.setattr(command, "read_portrait", read_and_change)
    monkeypatch.setattr(MultiViewOutput, "save", remove_and_save)
    assert generate(people, "--steps", 1, "--quiet") == 1
    assert "ann.png: expected a file that stays as it is, got one that changed" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["ben", "cleo", "failures.json"]
    assert json.loads((tmp_path / "out/cleo/run.json").read_text())["portrait_sha256"] == digest


def test_names_as_long_as_a_file_system_takes(generate, people, tmp_path):
    (people / "ann.png").rename(people / f"{'x' * 251}.png")
    assert generate(people, "--steps", 1, "--quiet") == 0
    assert names(tmp_path / "out") == ["ben", "cleo", "x" * 251]


def test_what_another_process_makes_is_left_to_it(generate, people, tmp_path, capsys):
    claim = Claim.take(tmp_path / "out" / "ben")
    assert generate(people, "--steps", 1, "--json", "--quiet") == 0
    claim.release()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    [left] = [event for event in events if event["event"] == "left"]
    assert left["folder"] == str(tmp_path / "out" / "ben")
    assert (events[-1]["made"], events[-1]["left"]) == (2, 1)
    [*_, last] = [event for event in events if event["event"] == "progress"]
    assert (last["done"], last["of"]) == (2, 2)


def test_an_interrupted_run_says_what_failed_until_then(generate, people, tmp_path, monkeypatch, capsys):
    (people / "ann.png").write_text("no picture")
    steps, runs = MultiViewDiffusionPipeline.steps, []

    def interrupted(pipeline, run):
        runs.append(run)
        if len(runs) == 2:
            until = time.monotonic() + 60
            while "ben" not in names(tmp_path / "out") and time.monotonic() < until:
                time.sleep(0.01)
            raise KeyboardInterrupt
        yield from steps(pipeline, run)

    monkeypatch.setattr(MultiViewDiffusionPipeline, "steps", interrupted)
    assert generate(people, "--steps", 1, "--quiet") == 130
    shown = capsys.readouterr().err
    assert "ann.png: expected an image file" in shown and "interrupted after 1 portraits" in shown
    [failure] = json.loads((tmp_path / "out" / "failures.json").read_text())["failures"]
    assert failure["portrait"] == str(people / "ann.png")


def test_overwrite_replaces_what_other_options_made(generate, people, tmp_path):
    assert generate(people, "--steps", 1, "--quiet") == 0
    (people / "ann.png").unlink()
    assert generate(people, "--steps", 2, "--quiet", "--overwrite") == 0
    steps = {
        name: json.loads((tmp_path / "out" / name / "run.json").read_text())["num_inference_steps"]
        for name in names(tmp_path / "out")
    }
    assert steps == {"ann": 1, "ben": 2, "cleo": 2}
    before = snapshot(tmp_path / "out")
    assert generate(people, "--steps", 2, "--quiet", "--overwrite") == 0
    assert snapshot(tmp_path / "out") == before


def test_a_bad_portrait_does_not_stop_the_others(generate, people, tmp_path, capsys):
    (people / "bad.png").write_text("no picture")
    for _ in range(2):
        assert generate(people, "nowhere.png", "--steps", 1, "--batch", 2, "--quiet") == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gafext: error: ")]
        assert len(errors) == 2 and "bad.png" in errors[0] and "nowhere.png" in errors[1]
        failures = json.loads((tmp_path / "out" / "failures.json").read_text())["failures"]
        assert [failure["portrait"] for failure in failures] == [str(people / "bad.png"), "nowhere.png"]
        assert names(tmp_path / "out") == ["ann", "ben", "cleo", "failures.json"]
    shutil.copy(people / "ann.png", people / "bad.png")
    assert generate(people, "--steps", 1, "--quiet") == 0
    assert names(tmp_path / "out") == ["ann", "bad", "ben", "cleo"]


def test_events(generate, people, capsys, tmp_path):
    (people / "bad.png").write_text("no picture")
    assert generate(people, "--steps", 2, "--quiet", "--json") == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("portrait") == 3 and kinds.count("failed") == 1
    assert events[0]["portraits"] == events[0]["missing"] == 4
    done = [event["done"] for event in events if event["event"] == "progress"]
    assert done == sorted(done) and done[0] == 0.5 and done[-1] == 4
    folders = [event["folder"] for event in events if event["event"] == "portrait"]
    assert folders == [str(tmp_path / "out" / name) for name in ("ann", "ben", "cleo")]
    assert events[-1]["made"] == 3 and events[-1]["failed"] == 1 and 0 <= events[-1]["loop_idle"] < 1


def test_log_levels(generate, people, capsys, tmp_path):
    (people / "ann.jpg").write_bytes((people / "ben.jpg").read_bytes())
    (tmp_path / "out" / ".gafext-ann" / "views").mkdir(parents=True)
    assert generate(people, "--steps", 1, "--quiet", "--log-level", "info") == 0
    text = capsys.readouterr().err
    assert "what a killed run left is removed" in text and "made from" in text and "ann-2" in text
    shutil.rmtree(tmp_path / "out")
    assert generate(people, "--steps", 1, "--quiet", "--log-level", "error") == 0
    assert "ann-2" not in capsys.readouterr().err


def test_wrong_options_leave_nothing(generate, people, tmp_path, capsys):
    for options in (["--batch", 0], ["--views", 0], ["--guidance", 99], ["--model", "./nowhere"], ["--strength", 0.5]):
        assert generate(people, "--steps", 2, "--quiet", *options) == 1, options
        assert capsys.readouterr().err.startswith("gafext: ")
        assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []
    (tmp_path / "empty").mkdir()
    assert generate(tmp_path / "empty") == 1 and "empty" in capsys.readouterr().err


def test_interrupt(generate, people, tmp_path, capsys, monkeypatch):
    steps, calls = MultiViewDiffusionPipeline.steps, []

    def interrupt(self, run):
        calls.append(run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        yield from steps(self, run)

    monkeypatch.setattr(MultiViewDiffusionPipeline, "steps", interrupt)
    assert generate(people, "--steps", 1, "--quiet") == 130
    assert "the same command goes on" in capsys.readouterr().err
    left = names(tmp_path / "out")
    assert set(left) <= {"ann", "ben"}
    before = snapshot(tmp_path / "out")
    assert generate(people, "--steps", 1, "--quiet") == 0
    assert names(tmp_path / "out") == ["ann", "ben", "cleo"] and before.items() <= snapshot(tmp_path / "out").items()


_ON_A_SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs {out} || exit 77
{python} -m gafext generate {people} --model {model} --out {out}/out --device cpu --steps 1 --quiet --turntable none
echo "exit code $?"
find {out}/out -type f -o -name '.*' | sort
"""


def test_a_full_disk(checkpoint, people, tmp_path):
    (tmp_path / "disk").mkdir()
    names = {"out": tmp_path / "disk", "python": sys.executable, "people": people, "model": checkpoint}
    script = _ON_A_SMALL_DISK.format(size="{size}", **names)

    def run(size):
        shell = ["unshare", "--map-root-user", "--mount", "sh", "-c", script.replace("{size}", size)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(shell, capture_output=True, text=True, env=env, timeout=300)

    if shutil.which("unshare") is None or subprocess.run(["unshare", "--map-root-user", "--mount", "true"]).returncode:
        pytest.skip("no right to a namespace of mounts")
    if run("1k").returncode == 77:
        pytest.skip("no right to mount a small disk")
    whole = run("64m")
    assert "exit code 0" in whole.stdout, whole.stderr
    files = {line for line in whole.stdout.splitlines() if "/ann/" in line}
    bytes_of_one = 700_000
    full = run(str(int(1.5 * bytes_of_one)))
    assert "exit code 1" in full.stdout and "Traceback" not in full.stderr
    assert "cannot be written" in full.stderr and "No space left on device" in full.stderr
    left = set(full.stdout.splitlines()[1:])
    assert left in (set(), files), left


def test_a_full_disk_while_saving(generate, people, tmp_path, capsys, monkeypatch):
    save = Image.Image.save

    def full(self, path, *arguments, **options):
        if ".gafext-ben" in str(path) and "view_001" in str(path):
            raise OSError(28, "No space left on device")
        return save(self, path, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    assert generate(people, "--steps", 1, "--quiet") == 1
    text = capsys.readouterr().err
    assert "out/ben: cannot be written ([Errno 28] No space left on device)" in text and "Traceback" not in text
    assert "ann" in names(tmp_path / "out") and set(names(tmp_path / "out")) <= {"ann", "cleo"}  # whole ones
    monkeypatch.undo()
    assert generate(people, "--steps", 1, "--quiet") == 0
    assert names(tmp_path / "out") == ["ann", "ben", "cleo"]
