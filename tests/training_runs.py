"""Training runs at a tiny size: their data and parent, their command lines, and the losses that they leave."""

import json
import os
import runpy
import sys
from pathlib import Path

import diffusers
from helpers import ROOT
from small_checkpoints import SD_SCHEDULE, stock_clip, stock_unet, stock_vae

from gafext.cli import main

write_heads = runpy.run_path(str(ROOT / "examples" / "train" / "write_heads.py"))["write_heads"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
OPTIONS = ("--cpu", "--batch", "2", "--views", "2", "--warmup", "1", "--rate", "1e-3", "--validation-steps", "2")


def write_files(root: Path) -> Path:
    """Write data of three heads, and an assembled parent."""
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


def command(files: Path, out: Path | str, *options: str) -> list[str]:
    return ["train", str(files / "data"), "--parent", str(files / "parent"), "--out", str(out), *OPTIONS, *options]


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]
