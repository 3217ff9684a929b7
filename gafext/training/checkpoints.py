"""State of a run: the averaged weights, and checkpoints that a run resumes from."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn

from gafext.errors import CheckpointError, OutputError
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.training.fsdp import copy_whole, part, whole
from gafext.training.latents import digest_weights
from gafext.training.settings import Settings

_STATE = "checkpoint"
_SETTINGS = "settings.json"
_WEIGHTS = ("train", "adam_8bit", "fsdp", "parent")  # what decides which tensors a checkpoint has


class Average:
    """Exponential moving average of the trained weights."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        own = dict(module.named_parameters())
        for name, weight in self.weights.items():
            part(weight).lerp_(part(own[name].detach()), 1 - decay)

    @torch.no_grad()
    def exchange(self, module: nn.Module) -> None:
        """Exchange the averaged weights and the module's; twice restores both."""
        own = dict(module.named_parameters())
        for name, weight in self.weights.items():
            kept = own[name].detach().clone()
            own[name].copy_(weight)
            weight.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": torch.tensor(self.steps), **{name: whole(weight) for name, weight in self.weights.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        for name, weight in self.weights.items():
            copy_whole(weight, state[name])


class Clock:
    """Seconds of training, of all sittings of a run together; it goes between `__enter__` and `__exit__`."""

    def __init__(self):
        self._before, self._since = 0.0, None

    def __enter__(self) -> Clock:
        self._since = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._before, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

    def state_dict(self) -> dict[str, Tensor]:
        return {"seconds": torch.tensor(self.seconds, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._before = state["seconds"].item()


_DAMAGED = "expected a checkpoint of gafext train, but it is damaged; remove it to start anew"


def describe(
    pipeline: MultiViewDiffusionPipeline, settings: Settings, source: dict[str, Any], *, precision: str, fsdp: bool
) -> dict[str, Any]:
    """Describe a run before its first step, as a checkpoint keeps it and `compare` reads it.

    Args:
        pipeline: the parent, of whose trained networks a digest is kept.
        settings: settings of the run.
        source: `Source.described`.
        precision: mixed precision that is in use.
        fsdp: whether the weights are divided among processes.
    """
    digest = hashlib.sha256(repr(pipeline.unet.config).encode())
    digest_weights(digest, pipeline.unet)
    if settings.encoder_rate is not None and pipeline.image_encoder is not None:
        digest_weights(digest, pipeline.image_encoder)
    own = {"parent": digest.hexdigest()[:16], "precision": precision, "fsdp": fsdp}
    return {**asdict(settings), **source, **own}


def compare(folder: Path, described: dict[str, Any]) -> list[str]:
    """Say what differs between a run and the one that wrote a checkpoint, one sentence per setting.

    Args:
        folder: the checkpoint.
        described: description of the run.

    Raises:
        CheckpointError: the checkpoint is damaged, or the other run trained other weights or held other heads out, or
            has no state of float16.
    """
    try:
        before = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / _SETTINGS}: {_DAMAGED} ({error})") from None
    changed = {name: before[name] for name in described if before.get(name, described[name]) != described[name]}
    both = (before.get("encoder_rate"), described.get("encoder_rate"))
    fatal = ["encoder_rate"] if None in both else []  # it may change, but not begin or end
    fatal += [*_WEIGHTS, "held_out"]
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
    try:
        accelerator.save_state(str(temporary))
    except (SafetensorError, OSError, RuntimeError) as error:  # of a full disk, by what was being written
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"{out}: cannot be written ({error})") from None
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
        if accelerator.is_main_process:
            _shorten(out / "log.jsonl", 0)
        return 0
    folder, step = out / name, int(name.rpartition("-")[2])
    if not (folder / _SETTINGS).is_file():
        raise CheckpointError(
            f"{folder}: expected it in the output folder of every node, as in the main process's, got none; share --out"
        )
    differences = compare(folder, described)
    try:
        accelerator.load_state(str(folder))
    except Exception as error:  # of whatever reads one of its files
        raise CheckpointError(f"{folder}: {_DAMAGED} ({error})") from None
    accelerator.step = 0  # of batches: a checkpoint is written where a step of the optimizer ends
    if accelerator.is_main_process:
        _shorten(out / "log.jsonl", step)
    accelerator.print("; ".join([f"{folder}: resumed at step {step}", *differences]))
    return step


def _shorten(log: Path, last: int) -> None:
    """Remove the lines of steps that are taken again, and what a killed process left of a line."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
        with suppress(ValueError, KeyError, TypeError):
            kept += [line] if json.loads(line)["step"] <= last and line.endswith("\n") else []
    temporary = log.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(log)
