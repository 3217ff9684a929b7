"""One portrait by two processes: each computes a pass of guidance, and the views are those of one process."""

import argparse
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from small_checkpoints import portrait, run

from gafext.cli import main
from gafext.guidance import check_parallel
from gafext.portraits.command import process_pair

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def generate(checkpoint, picture, out, *more, processes=None):
    """Run the command, in as many processes of torchrun; returns what came of it and the views."""
    start = [] if processes is None else [*LAUNCHER, processes]
    options = ["generate", picture, "--model", checkpoint, "--device", "cpu", "--views", 3, "--steps", 4]
    command = [sys.executable, *start, "-m", "gafext", *options, "--out", out, *more]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, timeout=300)
    return done, [np.asarray(Image.open(path)) for path in sorted(out.glob("view_*.png"))]


@pytest.fixture
def picture(tmp_path):
    portrait().save(tmp_path / "portrait.png")
    return tmp_path / "portrait.png"


@pytest.mark.parametrize("more", [(), ("--guidance-interval", "0.5", "3")])
def test_two_processes_make_the_views_of_one(checkpoint, picture, tmp_path, more):
    alone, expected = generate(checkpoint, picture, tmp_path / "alone", "--quiet", *more)
    assert alone.returncode == 0 and len(expected) == 3, alone.stderr
    parallel = ("--parallel", "guidance", *more)
    done, views = generate(checkpoint, picture, tmp_path / "both", *parallel, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 views in") == 1  # one of them saves, and says so
    apart = np.abs(np.stack(views).astype(int) - np.stack(expected))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01  # products of half as many rows are rounded elsewhere


def test_each_process_computes_half_of_the_rows(checkpoint, tmp_path):
    """In Python: the same call in both; each returns the views, of one process that computes the passes in turn."""
    script = tmp_path / "half.py"
    script.write_text(
        "import sys, torch, gafext\n"
        "from dataclasses import replace\n"
        "from gafext.guidance import guide\n"
        "from gafext.predictor import Predictor\n"
        "from small_checkpoints import count_rows, portrait, run\n"
        "torch.distributed.init_process_group('gloo')\n"
        "pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(sys.argv[1], device='cpu')\n"
        "rows = count_rows(pipe)\n"
        "options = {'guidance_scale': 3.0, 'num_views': 2, 'parallel': 'guidance'}\n"
        "images = run(pipe, **options).images\n"
        "rank, seen = torch.distributed.get_rank(), list(rows)\n"
        "made = pipe.prepare(portrait(), generator=0, **options)\n"
        "def predict(**changes):\n"
        "    with torch.no_grad():\n"
        "        return Predictor(pipe.unet, replace(made, **changes))(made.latents, 500)\n"
        "halves = [made.conditions.unconditional(1), made.conditions.conditional(1)]\n"
        "in_turn = guide(*(predict(parallel=None, conditions=half) for half in halves), 3.0)\n"
        "torch.save((seen, images, torch.equal(predict(), in_turn)), f'{sys.argv[2]}/{rank}.pt')\n"
        "torch.distributed.destroy_process_group()\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCHER, 2, script, checkpoint, tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    (rows, images, equal), (others, same, as_equal) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert rows == others == [2, 2] and torch.equal(images, same) and equal and as_equal


def test_one_process_is_refused(pipe, capsys, tmp_path):
    with pytest.raises(ValueError, match="parallel: expected 2 processes, one per pass of guidance, got 1"):
        run(pipe, parallel="guidance")
    with pytest.raises(ValueError, match="parallel: expected None or 'guidance', got 'views'"):
        run(pipe, parallel="views")
    assert main(["generate", "--parallel", "guidance", "--out", str(tmp_path / "views"), "--device", "cpu"]) == 1
    assert "--parallel: expected 2 processes" in capsys.readouterr().err
    with pytest.raises(ValueError, match="parallel: expected none for a stream of portraits"):
        list(pipe.map([portrait()], parallel="guidance"))
    many = ["generate", "a.png", "b.png", "--parallel", "guidance", "--out", str(tmp_path / "views")]
    assert main(many) == 1 and "--parallel: expected one portrait, got several" in capsys.readouterr().err


def test_what_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    check_parallel("guidance", guided=True, seeded=True)
    with pytest.raises(ValueError, match="guidance_scale over 1"):
        check_parallel("guidance", guided=False, seeded=True)
    with pytest.raises(ValueError, match="expected a seed in both processes"):
        check_parallel("guidance", guided=True, seeded=False)


@pytest.mark.parametrize("generator", [None, [None], [3, None]])
def test_every_portrait_needs_a_seed(pipe, monkeypatch, generator):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    portraits = [portrait(index) for index in range(len(generator or [0]))]
    with pytest.raises(ValueError, match="expected a seed in both processes"):
        pipe.prepare(portraits, parallel="guidance", generator=generator)


@pytest.mark.parametrize(
    ("device", "words"), [("cuda", "expected 2 GPUs, got"), ("cuda:0", "got cuda:0"), ("mps", "got mps")]
)
def test_each_process_has_a_device_of_its_own(monkeypatch, device, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--parallel: .*{words}"), process_pair(argparse.Namespace(device=device)):
        pass
