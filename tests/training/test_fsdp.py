"""Runs whose weights FSDP divides between two processes, against runs of one process."""

import json
import re
import subprocess

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file
from training_runs import ENVIRONMENT, LAUNCH, command, losses

from gafext import MultiViewDiffusionPipeline
from gafext.cli import main
from gafext.errors import CheckpointError
from gafext.models.blocks import MultiViewTransformerBlock, ResnetBlock2D
from gafext.training.checkpoints import compare
from gafext.training.run import start
from gafext.training.settings import Settings

DIVIDED = [*LAUNCH, str(ROOT / "tests" / "fsdp_on_cpus.py")]


def divided(words):
    done = subprocess.run([*DIVIDED, *words], env=ENVIRONMENT, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"(\d+) units", done.stdout)[1])


def test_divided_weights_are_trained_as_whole_ones(files, tmp_path):
    """Low-rank updates, of which some get no gradient; the encoder; recomputed blocks; two batches a step."""
    options = ("--train", "lora", "--rank", "2", "--encoder-rate", "1e-4", "--checkpointing", "--accumulate", "2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(command(files, one, "--steps", "3", *options)) == 0
    blocks = (ResnetBlock2D, MultiViewTransformerBlock)
    unet = MultiViewDiffusionPipeline.from_pretrained(files / "parent").unet
    count = sum(isinstance(module, blocks) for module in unet.modules())
    assert divided(command(files, two, "--steps", "2", *options)) == count + 1 > 10
    divided(command(files, two, "--steps", "3", *options))  # resumes
    assert losses(two) == pytest.approx(losses(one), rel=1e-4) and len(losses(two)) == 3
    whole, gathered = (MultiViewDiffusionPipeline.from_pretrained(folder / "model") for folder in (one, two))
    parent = MultiViewDiffusionPipeline.from_pretrained(files / "parent").unet.state_dict()
    theirs, ours = whole.unet.state_dict(), gathered.unet.state_dict()
    assert ours.keys() == theirs.keys() == parent.keys()
    changed = {name for name in parent if not torch.equal(parent[name], theirs[name])}
    assert changed and changed >= {name for name in parent if not torch.equal(parent[name], ours[name])}
    # Of a gradient near zero Adam's first steps have the rate's size and any sign: all weights are compared together.
    apart, moved = (sum((one[name] - theirs[name]).square().sum() for name in theirs).sqrt() for one in (ours, parent))
    assert apart < 0.01 * moved
    lines = [json.loads(line) for line in (two / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "psnr" in line] == [2, 3]
    encoders = [folder / "image_encoder" / "model.safetensors" for folder in (files / "parent", two / "model")]
    before, after = map(load_file, encoders)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # Each process wrote its part of the state.
    state = sorted(two.glob("checkpoint-*"))[-1] / "pytorch_model_fsdp_0"
    assert len(list(state.glob("*.distcp"))) == 2


def test_a_checkpoint_of_divided_weights_is_not_one_of_whole_ones(tmp_path):
    described = {"train": "new", "precision": "no", "fsdp": True}
    (tmp_path / "settings.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="expected fsdp True, as before, got False"):
        compare(tmp_path, {**described, "fsdp": False})


def test_the_first_version_of_fsdp_is_refused(tmp_path, monkeypatch):
    from accelerate.state import PartialState
    from fsdp_on_cpus import Sharded

    monkeypatch.setattr(Sharded, "version", 1)
    monkeypatch.setattr("gafext.training.run.Accelerator", Sharded)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", None)
    with pytest.raises(ValueError, match="expected whole weights .* or FSDP of version 2, got FSDP of version 1"):
        start(tmp_path, Settings(cpu=True))
