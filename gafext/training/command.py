"""`gafext train`: the check of the data, and the run."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from gafext.training.batches import Sampling
from gafext.training.data import read_heads, write_index

OptionsType = TypeVar("OptionsType")


def train_command(args: argparse.Namespace) -> int:
    """Run `gafext train` and return its exit code."""
    if args.check:
        return _check(args)
    for name in ("parent", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name}: expected a folder, got none")
    for name in ("steps", "batch", "views", "accumulate", "save_every", "validation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected a whole number above 0, got {getattr(args, name)}")
    if args.validation < 0:
        raise ValueError(f"--validation: expected 0 heads or more, got {args.validation}")
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("train: expected accelerate, which is not installed: pip install gafext[train]")
    from gafext.training.train import Settings, train

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


def _check(args: argparse.Namespace) -> int:
    heads, faults = read_heads(args.data)
    views, normals = sum(len(head.pictures) for head in heads), sum(bool(head.normals) for head in heads)
    print(f"{len(heads)} heads, {views} views, {normals} heads with normal maps, {len(faults)} faults")
    for fault in faults:
        print(fault)
    folder = args.cache or (None if args.out is None else Path(args.out) / "cache")
    if folder is not None:
        write_index(Path(folder) / "index.json", heads)
    return 1 if faults else 0
