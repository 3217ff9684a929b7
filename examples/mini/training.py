"""Training loop of all stages but the U-Net's: time limit, resumable checkpoints, averaged weights, log of losses."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from rungs import RUNGS, Rung
from torch import Tensor, nn

WARMUP = 200  # steps of linear warm-up of the learning rate
DECAY = 0.3  # final fraction of the time limit, over which the learning rate decays
RECORD = 50  # steps between two losses in the log
AVERAGE = 0.999  # decay of the averaged weights, which are measured and exported


def arguments(description: str, *, intervals: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rung", choices=RUNGS, default="cpu", help="set of sizes in rungs.py")
    add("--out", type=Path, default=Path("mini"), help="folder for checkpoints, logs and weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--minutes",
        type=float,
        default=60,
        help="time limit: of the U-Net's stage and on a GPU wall-clock time, else processor time",
    )
    add("--steps", type=int, help="stop after this number of steps; a later run resumes")
    add("--seed", type=int, default=0)
    add(
        "--start", type=Path, metavar="FOLDER", help="model whose weights are carried over where names and shapes agree"
    )
    if intervals:
        add("--checkpoint-every", type=float, default=120, metavar="SECONDS")
        add("--measure-every", type=float, default=240, metavar="SECONDS")
    return parser


class Trainer:
    """Trainer of one stage.

    Args:
        name: name of the stage; its files are `<out>/<name>.{pt,json}`.
        args: parsed command line.
        modules: modules to train, by name, on the device.
        rate: learning rate of AdamW.
        slow: modules or submodules that are trained with `slow_rate`.
        slow_rate: learning rate of `slow`.
        loss: function from the index of a step to its loss.
        measure: function from averaged modules and step to numbers to log; called at intervals and at the end.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        modules: dict[str, nn.Module],
        *,
        rate: float,
        slow: tuple[nn.Module, ...] = (),
        slow_rate: float = 0.0,
        loss: Callable[[int], Tensor],
        measure: Callable[[dict[str, nn.Module], int], dict[str, float]],
    ):
        self.args, self.modules, self.loss, self.measure = args, modules, loss, measure
        self.device = torch.device(args.device)
        self.averaged = {key: deepcopy(module).eval().requires_grad_(False) for key, module in modules.items()}
        self.parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        slowly = {id(parameter) for module in slow for parameter in module.parameters()}
        groups = [
            {"params": [p for p in self.parameters if (id(p) in slowly) == chosen], "full_rate": full_rate}
            for chosen, full_rate in ((False, rate), (True, slow_rate))
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.checkpoint, self.log = args.out / f"{name}.pt", args.out / f"{name}.json"
        self.step, self.seconds, self.curves = 0, 0.0, []
        args.out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.is_file():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
            self.averaged[key].load_state_dict(state["averaged"][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curves = state["step"], state["seconds"], state["curves"]
        print(f"{self.checkpoint}: resumed at step {self.step}", flush=True)

    def save(self) -> None:
        state = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "averaged": {key: module.state_dict() for key, module in self.averaged.items()},
            "optimizer": self.optimizer.state_dict(),
            **{"step": self.step, "seconds": self.seconds, "curves": self.curves},
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)
        self.log.write_text(json.dumps(self.curves, indent=0))

    def _clock(self) -> float:
        return time.process_time() if self.device.type == "cpu" else time.monotonic()

    @property
    def _progress(self) -> float:
        """Elapsed fraction of the time limit."""
        return self.seconds / (60 * self.args.minutes)

    @property
    def done(self) -> bool:
        return self._progress >= 1 or (self.args.steps is not None and self.step >= self.args.steps)

    def _record(self, **numbers: float) -> None:
        entry = {"step": self.step, "seconds": round(self.seconds, 1)}
        entry |= {key: float(f"{value:.5g}") for key, value in numbers.items()}
        self.curves.append(entry)
        print(json.dumps(entry), flush=True)

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(AVERAGE, (1 + self.step) / (10 + self.step))
        for key, module in self.modules.items():
            averaged = list(self.averaged[key].parameters())
            torch._foreach_lerp_(averaged, list(module.parameters()), 1 - decay)

    def _advance(self) -> Tensor:
        """Take one step of the optimizer; return the loss."""
        fall = min(1.0, (1 - self._progress) / DECAY)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_rate"] * min(1.0, (self.step + 1) / WARMUP) * max(fall, 0.01)
        loss = self.loss(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self._average()
        return loss.detach()

    def run(self) -> dict[str, nn.Module]:
        """Train until the time limit or the number of steps is reached; return the averaged modules.

        A stage that was done before is left as it is, and so is what others made of its results.
        """
        if self.step > 0 and self.done:
            print(f"{self.checkpoint}: done after {self.step} steps", flush=True)
            return self.averaged
        losses, before = [], self._clock()
        last_saved = last_measured = self.seconds
        while not self.done:
            losses.append(self._advance())
            now = self._clock()
            self.seconds, before = self.seconds + now - before, now
            saves = self.seconds - last_saved > self.args.checkpoint_every
            measures = self.seconds - last_measured > self.args.measure_every
            if self.step % RECORD == 0 or saves or measures or self.done:
                mean = torch.stack(losses).mean().item()
                if not math.isfinite(mean):  # nothing of it is saved
                    raise SystemExit(f"the loss is {mean} at step {self.step}: start again from {self.checkpoint}")
            if self.step % RECORD == 0:
                self._record(loss=mean)
                losses.clear()
            if saves:
                self.save()
                last_saved = self.seconds
            if measures:
                self._record(**self.measure(self.averaged, self.step))
                last_measured = self.seconds
        self._record(**self.measure(self.averaged, self.step))
        self.save()
        return self.averaged


def fast_in_bfloat16(device: torch.device) -> bool:
    """Return whether training in bfloat16 is faster: on GPUs, and on CPUs that multiply it.

    A step of the U-Net takes .66 of float32's time on a Zen 4 with AVX512_BF16, of the autoencoder .65; on an EPYC with
    AVX2 the U-Net's took 11 times as long.
    """
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return an autocast context to bfloat16 where that is faster, or one that does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_in_bfloat16(device))


def rung_of(args: argparse.Namespace) -> Rung:
    return RUNGS[args.rung]
