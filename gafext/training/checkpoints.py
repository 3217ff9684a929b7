"""State of a run: the averaged weights, and checkpoints that a run resumes from."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gafext.errors import CheckpointError
from gafext.models.unet import MultiViewUNet
from gafext.training.settings import Settings

_STATE = "checkpoint"
_SETTINGS = "settings.json"
_WEIGHTS = ("train", "rank", "adam_8bit")  # settings that decide which tensors a checkpoint has


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


def save(accelerator: Accelerator, out: Path, step: int, settings: Settings) -> None:
    """Write a checkpoint and remove those before it."""
    temporary, final = out / f"{_STATE}.tmp", out / f"{_STATE}-{step:08d}"
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        (temporary / _SETTINGS).write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)  # whole or not at all
        for old in _checkpoints(out)[:-1]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _checkpoints(out: Path) -> list[Path]:
    return sorted(path for path in out.glob(f"{_STATE}-*") if path.is_dir())


def resume(accelerator: Accelerator, out: Path, settings: Settings) -> int:
    """Load the last checkpoint; return its step, or 0 without one.

    Raises:
        CheckpointError: its run trained other weights.
    """
    found = _checkpoints(out)
    if not found:
        return 0
    before = json.loads((found[-1] / _SETTINGS).read_text(encoding="utf-8"))
    for name in _WEIGHTS:
        if before[name] != getattr(settings, name):
            got = getattr(settings, name)
            raise CheckpointError(
                f"{found[-1]}: expected {name} {before[name]}, as before, got {got}; choose another --out"
            )
    accelerator.load_state(str(found[-1]))
    step = int(found[-1].name.rpartition("-")[2])
    if accelerator.is_main_process and (out / "log.jsonl").is_file():  # steps after it are taken again
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (out / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    accelerator.print(f"{found[-1]}: resumed at step {step}")
    return step
