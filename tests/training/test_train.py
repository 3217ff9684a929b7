"""`gafext train` at a tiny size: it learns, resumes, agrees over processes, and keeps what it should not touch."""

import json
import os
import runpy
import subprocess
import sys

import diffusers
import pytest
import torch
from helpers import ROOT
from PIL import Image
from small_checkpoints import SD_SCHEDULE, run, stock_clip, stock_unet, stock_vae

from gafext import MultiViewDiffusionPipeline
from gafext.cli import main

write_heads = runpy.run_path(str(ROOT / "examples" / "train" / "write_heads.py"))["write_heads"]
OPTIONS = ("--cpu", "--batch", "2", "--views", "2", "--warmup", "1", "--rate", "1e-3", "--validation-steps", "2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data of three heads, and an assembled parent."""
    root = tmp_path_factory.mktemp("train")
    write_heads(root / "data", 3, views=4, size=32)
    stock_unet().save_pretrained(root / "sd" / "unet")
    stock_vae((8, 16, 16), seed=None, scaling_factor=0.3).save_pretrained(root / "sd" / "vae")
    diffusers.DDIMScheduler(
        **SD_SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    ).save_pretrained(root / "sd" / "scheduler")
    stock_clip(num_hidden_layers=3, seed=None).save_pretrained(root / "clip")
    command = ["assemble", "--parent", str(root / "sd"), "--image-encoder", str(root / "clip")]
    assert main([*command, "--out", str(root / "parent")]) == 0
    return root


def command(files, out, *options):
    return ["train", str(files / "data"), "--parent", str(files / "parent"), "--out", str(out), *OPTIONS, *options]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(files):
    """Losses and folder of four steps at once."""
    assert main(command(files, files / "whole", "--steps", "4")) == 0
    return files / "whole"


def test_a_resumed_run_has_the_same_losses_and_weights(files, whole):
    out = files / "resumed"
    assert main(command(files, out, "--steps", "2", "--save-every", "2")) == 0
    with (out / "log.jsonl").open("a") as log:  # the step that a killed run took after its checkpoint
        log.write('{"step": 3, "loss": 0.0}\n')
    assert main(command(files, out, "--steps", "4")) == 0
    assert losses(out) == losses(whole) and len(losses(out)) == 4
    ours, theirs = (MultiViewDiffusionPipeline.from_pretrained(f / "model").unet.state_dict() for f in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_agree_with_one(files, whole):
    out = files / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*launch, "-m", "gafext", *command(files, out, "--steps", "4")], env=environment, check=True, cwd=ROOT
    )
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)


def test_checkpointing_and_the_cache_change_no_loss(files, whole):
    out, cache = files / "recomputed", whole / "cache"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert main(command(files, out, "--steps", "4", "--checkpointing", "--cache", str(cache))) == 0
    assert losses(out) == pytest.approx(losses(whole), rel=1e-6)
    assert before and {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == before


def test_new_leaves_the_parents_weights_as_they_are(files, whole):
    parent, child = (MultiViewDiffusionPipeline.from_pretrained(f) for f in (files / "parent", whole / "model"))
    before, after = parent.unet.state_dict(), child.unet.state_dict()
    stock = stock_unet().state_dict().keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed & stock == {"conv_in.weight"} and any(".attn_cv." in name for name in changed)
    assert torch.equal(before["conv_in.weight"][:, :4], after["conv_in.weight"][:, :4])
    assert len(run(child).images) == 4 and (whole / "model" / "README.md").is_file()
    assert len(list((whole / "validation").glob("*.png"))) == 1


def test_the_loss_falls_on_one_head(files):
    out = files / "fit"
    options = ("--steps", "60", "--train", "all", "--validation", "2", "--rate", "2e-3", "--near", "0")
    assert main(command(files, out, *options)) == 0
    found = losses(out)
    assert sum(found[-15:]) < 0.7 * sum(found[:15])


@pytest.mark.parametrize("fault", ["missing", "size", "camera", "none"])
def test_check_names_what_is_broken(fault, tmp_path, capsys):
    write_heads(tmp_path / "data", 1, views=3, size=32, normals=False)
    folder = tmp_path / "data" / "head_000"
    if fault == "missing":
        (folder / "images" / "00000_01.png").unlink()
    elif fault == "size":
        Image.new("RGB", (16, 16)).save(folder / "images" / "00000_01.png")
    elif fault == "camera":
        values = json.loads((folder / "transforms_train.json").read_text())
        values["frames"][1]["camera_index"] = 0
        (folder / "transforms_train.json").write_text(json.dumps(values))
    words = {"missing": "00000_01.png: expected a picture, got no such file", "size": "16 x 16, 32 x 32"}
    words |= {"camera": "camera_index 0 disagrees", "none": "1 heads, 3 views"}
    code = main(["train", str(tmp_path / "data"), "--check", "--cache", str(tmp_path / "cache")])
    assert code == (fault != "none") and words[fault] in capsys.readouterr().out
    assert (tmp_path / "cache" / "index.json").is_file()
