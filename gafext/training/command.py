"""`gafext train`: the check of the data, and the run."""

from __future__ import annotations

import argparse
import importlib.util
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from gafext.schedulers import MAX_STEPS
from gafext.training.batches import Sampling
from gafext.training.checks import unframed
from gafext.training.data import read_heads, write_index
from gafext.training.settings import Settings
from gafext.training.shards import INDEX, Shards, index_shards, write_shards

OptionsType = TypeVar("OptionsType")


def train_command(args: argparse.Namespace) -> int:
    """Run `gafext train` and return its exit code."""
    if args.check:
        return _check(args)
    if args.pack is not None:
        return _pack(args)
    for name in ("parent", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name}: expected a folder, got none")
    for name in ("steps", "rank", "batch", "views", "accumulate", "save_every", "validation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected a whole number above 0, got {getattr(args, name)}")
    for name in ("warmup", "validation", "validate_every"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected 0 or more, got {getattr(args, name)}")
    for name in ("near", "apart", "drop_image", "drop_all", "blindfold", "ema"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected a fraction, 0 to 1, got {getattr(args, name)}")
    for name, most in (("seed", 2**31 - 1), ("validation_steps", MAX_STEPS), ("portrait_angle", 180)):
        if not 0 <= getattr(args, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')}: expected 0 to {most}, got {getattr(args, name)}")
    for name in ("rate", "encoder_rate", "gamma", "minutes"):
        value = getattr(args, name)
        endless = name == "gamma" and value == math.inf  # all noise levels count alike
        if value is not None and not (0 < value < math.inf or endless):
            raise ValueError(f"--{name.replace('_', '-')}: expected a number over 0, got {value}")
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("train: expected accelerate, which is not installed: pip install gafext[train]")
    from gafext.training.train import train

    scores = train(
        args.data,
        args.parent,
        args.out,
        cache=args.cache,
        sampling=_options(Sampling, args),
        settings=_options(Settings, args),
    )
    if scores:
        print(f"held-out heads: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f}: {Path(args.out) / 'model'}")
    return 0


def _options(kind: type[OptionsType], args: argparse.Namespace) -> OptionsType:
    values: dict[str, Any] = {entry.name: getattr(args, entry.name) for entry in fields(kind)}  # pyright: ignore
    return kind(**values)


def _pack(args: argparse.Namespace) -> int:
    if not 0 < args.shard_mb < math.inf:
        raise ValueError(f"--shard-mb: expected a number over 0, got {args.shard_mb}")
    heads, faults = read_heads(args.data, views=args.views)
    if faults:
        raise ValueError(f"{faults[0]} ({len(faults)} faults; gafext train --check lists them)")
    packed = write_shards(heads, Path(args.pack), megabytes=args.shard_mb)
    print(f"{len(packed)} heads in {len({head.shard for head in packed})} shards: {args.pack}")
    return 0


def _check(args: argparse.Namespace) -> int:
    if Shards.are_at(args.data):
        if Path(args.data).is_dir() and not (Path(args.data) / INDEX).is_file():
            index_shards(Path(args.data))
        heads, faults = Shards(args.data).check(views=args.views)
    else:
        heads, faults = read_heads(args.data, views=args.views, thorough=True)
    views, normals = sum(len(head.pictures) for head in heads), sum(bool(head.normals) for head in heads)
    print(f"{len(heads)} heads, {views} views, {normals} heads with normal maps, {len(faults)} faults")
    for fault in faults:
        print(fault)
    if warning := unframed(heads):
        print(f"warning: {warning}")
    folder = args.cache or (None if args.out is None else Path(args.out) / "cache")
    if folder is not None and not Shards.are_at(args.data):
        write_index(Path(folder) / "index.json", heads)
    return 1 if faults else 0
