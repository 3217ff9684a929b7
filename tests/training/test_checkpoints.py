"""Checkpoints of a run: what a later run may change before it resumes, and what it may not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import GradientState
from helpers import ROOT
from safetensors import SafetensorError
from training_runs import ENVIRONMENT, LAUNCH, command, losses, write_heads

from gafext.cli import main
from gafext.errors import CheckpointError
from gafext.training.checkpoints import compare


@pytest.fixture(scope="module")
def begun(files):
    """Folder of three steps."""
    assert main(command(files, files / "begun", "--steps", "3")) == 0
    return files / "begun"


@pytest.fixture
def out(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "out")


def test_steps_of_the_optimizer_end_where_their_batches_do(files, out):
    """After three batches of one step each, steps of two batches begin anew."""
    assert main(command(files, out, "--steps", "4", "--accumulate", "2")) == 0
    assert GradientState().sync_gradients


def test_another_number_of_processes_resumes(files, begun, out):
    assert main(command(files, files / "whole", "--steps", "5")) == 0
    for steps, launcher in (("4", LAUNCH), ("5", [sys.executable])):
        words = [*launcher, "-m", "gafext", *command(files, out, "--steps", steps)]
        subprocess.run(words, env=ENVIRONMENT, cwd=ROOT, check=True)
    assert losses(out) == pytest.approx(losses(files / "whole"), rel=1e-5) and len(losses(out)) == 5


def test_other_settings_are_said_and_other_heads_held_out_refused(files, out, capsys):
    assert main(command(files, out, "--steps", "4", "--near", "0.5", "--gamma", "4")) == 0
    said = capsys.readouterr().out
    assert "resumed at step 3; " in said and all(change in said for change in ("near is 0.5, was 0.3", "gamma is 4"))
    assert "data is" not in said
    write_heads(files / "more" / "data", 1, views=4, size=32, first=7)
    shutil.copytree(files / "parent", files / "more" / "parent")
    shutil.copytree(files / "data", files / "more" / "data", dirs_exist_ok=True)
    shutil.move(files / "more" / "data" / "head_000", files / "more" / "data" / "head_003")
    assert main(command(files / "more", out, "--steps", "5")) == 1
    assert "expected held_out ['head_002'], as before, got ['head_003']" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "settings.json"])
def test_a_damaged_checkpoint_is_named(files, out, capsys, name):
    [folder] = out.glob("checkpoint-*")
    (folder / name).write_bytes((folder / name).read_bytes()[:10])
    assert main(command(files, out, "--steps", "3")) == 1
    shown = capsys.readouterr().err
    assert f"{folder}" in shown and "it is damaged; remove it to start anew" in shown


def test_a_full_disk_leaves_no_part_of_a_checkpoint(files, out, capsys, monkeypatch):
    def full(accelerator, folder):
        Path(folder).mkdir()
        raise SafetensorError("File too large (os error 27)")

    monkeypatch.setattr("accelerate.Accelerator.save_state", full)
    assert main(command(files, out, "--steps", "4")) == 1
    assert f"{out}: cannot be written (File too large (os error 27))" in capsys.readouterr().err
    assert not (out / "checkpoint.tmp").exists()


def test_float16_needs_a_scale_of_the_loss(begun):
    [folder] = begun.glob("checkpoint-*")
    values = {"train": "new", "precision": "no"}
    assert compare(folder, {**values, "precision": "bf16"}) == ["precision is bf16, was no"]
    with pytest.raises(CheckpointError, match="expected precision no, as before, got fp16"):
        compare(folder, {**values, "precision": "fp16"})


def test_a_node_without_the_checkpoint_is_named(files, begun, tmp_path):
    """Of two processes in folders of their own."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    shutil.copytree(begun, tmp_path / "0" / "out")
    script = 'cd "$0/$RANK" && exec "$@"'
    words = [sys.executable, "-m", "gafext", *command(files, "out", "--steps", "4")]
    done = subprocess.run(
        [*LAUNCH, "--no-python", "bash", "-c", script, str(tmp_path), *words],
        env=ENVIRONMENT,
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1
    assert "out/checkpoint-00000003: expected it in the output folder of every node" in done.stderr


def test_accelerates_own_precision_is_used(files, tmp_path):
    words = [sys.executable, "-m", "gafext", *command(files, tmp_path / "out", "--steps", "1")]
    subprocess.run(words, env={**ENVIRONMENT, "ACCELERATE_MIXED_PRECISION": "bf16"}, cwd=ROOT, check=True)
    [folder] = (tmp_path / "out").glob("checkpoint-*")
    assert "precision is no, was bf16" in compare(folder, {"train": "new", "precision": "no"})
