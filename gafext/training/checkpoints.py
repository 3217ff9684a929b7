"""State of a run: the averaged weights, and checkpoints that a run resumes from."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from gafext.errors import CheckpointError
from gafext.models.unet import MultiViewUNet
from gafext.training.batches import Sampling
from gafext.training.head import Head
from gafext.training.latents import digest_weights
from gafext.training.settings import Settings

_STATE = "checkpoint"
_SETTINGS = "settings.json"
_WEIGHTS = ("train", "adam_8bit", "parent")  # what decides which tensors a checkpoint has


class Average:
    """Exponential moving average of the trained weights."""

    def __init__(self, unet: MultiViewUNet, decay: float):
        self.decay, self.steps = decay, 0
        self.weights = {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, unet: MultiViewUNet) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        own = dict(unet.named_parameters())
        for name, weight in self.weights.items():
            weight.lerp_(own[name].detach(), 1 - decay)

    @torch.no_grad()
    def exchange(self, unet: MultiViewUNet) -> None:
        """Exchange the averaged weights and the U-Net's; twice restores both."""
        own = dict(unet.named_parameters())
        for name, weight in self.weights.items():
            kept = own[name].detach().clone()
            own[name].copy_(weight)
            weight.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": torch.tensor(self.steps), **self.weights}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        for name, weight in self.weights.items():
            weight.copy_(state[name])


def describe(
    unet: MultiViewUNet, settings: Settings, sampling: Sampling, *, precision: str, data: str, held_out: list[Head]
) -> dict[str, Any]:
    """Describe a run before its first step, as a checkpoint keeps it and `compare` reads it.

    Args:
        unet: the parent's U-Net, of which a digest is kept.
        settings, sampling: as for `train`.
        precision: mixed precision that is in use.
        data: digest of the heads that are trained on.
        held_out: heads of the validation.
    """
    digest = hashlib.sha256(repr(unet.config).encode())
    digest_weights(digest, unet)
    own = {"precision": precision, "data": data, "held_out": sorted(head.subject for head in held_out)}
    return {**asdict(settings), **asdict(sampling), "parent": digest.hexdigest()[:16], **own}


def compare(folder: Path, described: dict[str, Any]) -> list[str]:
    """Say what differs between a run and the one that wrote a checkpoint, one sentence per setting.

    Args:
        folder: the checkpoint.
        described: description of the run.

    Raises:
        CheckpointError: the other run trained other weights or held other heads out, or has no state of float16.
    """
    before = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    changed = {name: before[name] for name in described if before.get(name, described[name]) != described[name]}
    fatal = [*_WEIGHTS, "held_out"]
    fatal += ["rank"] if described["train"] == "lora" else []
    fatal += ["precision"] if described["precision"] == "fp16" else []  # others have no scale of the loss
    for name in fatal:
        if name in changed:
            raise CheckpointError(
                f"{folder}: expected {name} {changed[name]}, as before, got {described[name]}; choose another --out"
            )
    return [f"{name} is {described[name]}, was {value}" for name, value in changed.items()]


def save(accelerator: Accelerator, out: Path, step: int, described: dict[str, Any]) -> None:
    """Write a checkpoint, which keeps the description of its run, and remove those before it."""
    temporary, final = out / f"{_STATE}.tmp", out / f"{_STATE}-{step:08d}"
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        (temporary / _SETTINGS).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)  # whole or not at all
        for old in _checkpoints(out)[:-1]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _checkpoints(out: Path) -> list[Path]:
    return sorted(path for path in out.glob(f"{_STATE}-{'[0-9]' * 8}") if path.is_dir())


def resume(accelerator: Accelerator, out: Path, described: dict[str, Any]) -> int:
    """Load the last checkpoint; return its step, or 0 without one.

    Raises:
        CheckpointError: as for `compare`, or another process does not have the checkpoint of the main one.
    """
    found = [path.name for path in _checkpoints(out)]
    [name] = broadcast_object_list([found[-1] if found else None])
    if name is None:
        return 0
    folder, step = out / name, int(name.rpartition("-")[2])
    if not (folder / _SETTINGS).is_file():
        raise CheckpointError(
            f"{folder}: expected it in the output folder of every node, as in the main process's, got none; share --out"
        )
    differences = compare(folder, described)
    accelerator.load_state(str(folder))
    accelerator.step = 0  # of batches: a checkpoint is written where a step of the optimizer ends
    if accelerator.is_main_process:
        _shorten(out / "log.jsonl", step)
    accelerator.print("; ".join([f"{folder}: resumed at step {step}", *differences]))
    return step


def _shorten(log: Path, last: int) -> None:
    """Remove the lines of steps that are taken again, and what a killed process left of a line."""
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            kept += [line] if json.loads(line)["step"] <= last and line.endswith("\n") else []
    temporary = log.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(log)
