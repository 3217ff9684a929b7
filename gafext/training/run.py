"""A training run: steps with Accelerate, checkpoints, validation, and the folder that it leaves."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor
from tqdm import tqdm

from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.training.batches import Batch
from gafext.training.checkpoints import Average, Clock, describe, resume, save
from gafext.training.denoiser import Denoiser
from gafext.training.fsdp import Whole, divide_by_blocks, fill_gradients, gather_keys
from gafext.training.settings import Settings
from gafext.training.source import Source
from gafext.training.trained import choose_trained, leave_old, merge_updates, recomputing
from gafext.training.validation import publish

_PATIENCE = timedelta(days=1)  # of processes that wait for the one that validates; a dead one ends the run
_OTHERS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)  # ways to divide the weights that are not FSDP


def start(out: Path, settings: Settings) -> Accelerator:
    """Start Accelerate as its configuration and the settings say.

    Args:
        out: folder of the run, for TensorBoard's events where it is installed.
        settings: settings of the run.

    Raises:
        ValueError: Accelerate is set to divide the weights among processes by other means than FSDP 2.
    """
    try:
        accelerator = _accelerator(out, settings)
    except ImportError as error:  # of a way to divide the weights that is asked for and not installed
        raise ValueError(f"accelerate: {error}") from None
    divides = accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
    if divides or accelerator.distributed_type in _OTHERS:
        got = "FSDP of version 1" if divides else accelerator.distributed_type.value
        raise ValueError(f"accelerate: expected whole weights on every device, or FSDP of version 2, got {got}")
    if accelerator.is_fsdp2:
        divide_by_blocks(accelerator)
    return accelerator


def _accelerator(out: Path, settings: Settings) -> Accelerator:
    watched = importlib.util.find_spec("tensorboard") is not None
    return Accelerator(
        cpu=settings.cpu,
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulate,
        kwargs_handlers=[
            # Without text, attn2 adds its bias alone: its other weights get no gradient. Nor do the encoder's last
            # layers where the U-Net reads those before.
            DistributedDataParallelKwargs(
                find_unused_parameters=settings.train != "new" or settings.encoder_rate is not None
            ),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
        log_with="tensorboard" if watched else None,
        project_dir=out,
    )


def fit(
    accelerator: Accelerator,
    pipeline: MultiViewDiffusionPipeline,
    source: Source,
    out: Path,
    *,
    parent: str | Path,
    settings: Settings,
) -> dict[str, float]:
    """Train a pipeline's U-Net in place on the batches of a source; resume where `out` has a checkpoint.

    Args:
        accelerator: what `start` returned for these settings.
        pipeline: the parent, on the accelerator's device.
        source: the batches, and what measures views of heads that are held out.
        out: folder for `model/`, `log.jsonl`, TensorBoard's events, checkpoints and `validation/`.
        parent: name of the parent for the model card.
        settings: settings of the run.

    Returns:
        What `source.validate` measures of the averaged weights, which the pipeline keeps.

    Raises:
        ValueError: the loss is not finite, or the weights are not.
        CheckpointError: a checkpoint in `out` is of a run that trained other weights or held other heads out.
    """
    run = Run(accelerator, pipeline, source, out, settings)
    scores = run.take_steps()
    if accelerator.is_main_process:
        publish(pipeline, out / "model", parent, settings, run.step, scores)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return scores


def _optimizer(denoiser: Denoiser, settings: Settings, device: torch.device) -> torch.optim.Optimizer:
    """Make AdamW over what is trained; "encodes" tells the group of the image encoder from the other one."""
    of_encoder, others = [], []
    for name, weight in denoiser.named_parameters():
        if weight.requires_grad:
            slow = name.startswith(("image_encoder.", "unet.image_projection."))
            (of_encoder if slow else others).append(weight)
    groups = [{"params": others, "encodes": False}, {"params": of_encoder, "encodes": True}]
    groups = [group for group in groups if group["params"]]
    # Without weight decay: it would change the channels of conv_in that "new" leaves alone.
    options: dict[str, Any] = {"lr": settings.rate, "betas": (0.9, 0.99), "weight_decay": 0.0}
    if not settings.adam_8bit:
        return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"), **options)
    return importlib.import_module("bitsandbytes.optim").AdamW8bit(groups, **options)


class Run:
    """Steps of a run.

    Args:
        accelerator, pipeline, source, out, settings: as for `fit`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: MultiViewDiffusionPipeline,
        source: Source,
        out: Path,
        settings: Settings,
    ):
        self.accelerator, self.pipeline, self.source, self.out = accelerator, pipeline, source, out
        self.settings, self.unet = settings, pipeline.unet
        precision, divided = accelerator.mixed_precision, accelerator.is_fsdp2
        self.described = describe(pipeline, settings, source.described, precision=precision, fsdp=divided)
        choose_trained(self.unet, settings.train, rank=settings.rank, seed=settings.seed)
        encoder = None if settings.encoder_rate is None else pipeline.image_encoder
        if encoder is not None:
            encoder.requires_grad_(True)
        self.denoiser = Denoiser(
            self.unet,
            pipeline.solver.config,
            prompt_embeds=pipeline.prompt_embeds,
            gamma=settings.gamma,
            image_encoder=encoder,
        )
        self.whole = Whole(accelerator, self.denoiser) if divided else None
        optimizer = _optimizer(self.denoiser, settings, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(self.denoiser, optimizer)
        if divided:
            gather_keys(self.denoiser)
        self.trained = [weight for weight in self.denoiser.parameters() if weight.requires_grad]
        self.average, self.clock = Average(self.denoiser, settings.ema), Clock()
        accelerator.register_for_checkpointing(self.average, self.clock)
        self.step = resume(accelerator, out, self.described)
        if accelerator.log_with:
            accelerator.init_trackers("tensorboard")
        self.waited = 0.0

    def take_steps(self) -> dict[str, float]:
        """Take the steps that are left, leave the averaged weights in the pipeline, and return the last validation."""
        accumulate, first = self.settings.accumulate, self.step
        batches = self.source.batches(
            range(self.step * accumulate, self.settings.steps * accumulate),
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        total = self.settings.steps if self.settings.minutes is None else None
        bar = tqdm(total=total, initial=first, disable=not self.accelerator.is_main_process, unit="step")
        scores, validated, seen, seconds = {}, -1, 0, 0.0
        with recomputing(self.unet, self.settings.checkpointing), self.denoiser, self.clock:
            passed = self._passed()
            while passed < 1:
                before = time.monotonic()
                loss, heads = self._step(batches, passed)
                seconds += time.monotonic() - before  # without validations and checkpoints
                seen += heads * self.accelerator.num_processes
                self._log(loss)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if self.settings.validate_every and self.step % self.settings.validate_every == 0:
                    scores, validated = self._validate(), self.step
                passed = self._passed()
                bar.total = round(self.step / passed)  # of a run of minutes, as many as its pace promises
                if passed >= 1 or self.step % self.settings.save_every == 0:
                    self._check_weights()
                    save(self.accelerator, self.out, self.step, self.described)
        bar.close()
        if self.step > first:
            share = 100 * self.waited / seconds
            self.accelerator.print(f"{seen / seconds:.2f} heads per second, {share:.0f} % waiting for data")
        if validated != self.step:
            scores = self._validate()
        self._use_average()
        if self.whole is None or self.accelerator.is_main_process:  # divided weights cannot be merged one by one
            merge_updates(self.pipeline.unet)
        return scores

    def _passed(self) -> float:
        """Return the fraction of the run that is over: of its steps, or of its minutes if that is more."""
        share = self.step / self.settings.steps
        if self.settings.minutes is None:
            return share
        minutes = torch.tensor(self.clock.seconds / 60, device=self.accelerator.device)
        mean = cast(Tensor, self.accelerator.reduce(minutes, "mean"))  # the same on every process
        return max(share, mean.item() / self.settings.minutes)

    def _step(self, batches: Iterator[Batch], passed: float) -> tuple[float, int]:
        """Take a step of the optimizer; return the loss of the whole batch, and the heads of this process in it."""
        rate, encoder_rate = self.settings.rate_at(self.step, passed), self.settings.encoder_rate
        share = 1.0 if encoder_rate is None else encoder_rate / self.settings.rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate * share if group["encodes"] else rate
        self.denoiser.train()
        losses, heads = [], 0
        for _ in range(self.settings.accumulate):
            before = time.monotonic()
            batch = next(batches).to(self.accelerator.device)
            self.waited += time.monotonic() - before
            heads += len(batch.latents)
            with self.accelerator.accumulate(self.model):
                loss = self.model(batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    leave_old(self.unet, self.settings.train)
                    if self.whole is not None:
                        fill_gradients(self.trained)
                    self.accelerator.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(self.accelerator.reduce(loss.detach(), "mean"))
        self.step += 1
        self.average.update(self.denoiser)
        return torch.stack(losses).mean().item(), heads

    def _log(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}: lower --rate, and run again from the last checkpoint"
            )
        self.accelerator.log({"loss": loss}, step=self.step)
        self._write(seconds=round(self.clock.seconds, 2), loss=loss)

    def _check_weights(self) -> None:
        """Raise a ValueError rather than put weights that are not finite in the place of the last checkpoint."""
        if self.whole is None and not all(weight.isfinite().all() for weight in self.trained):
            raise ValueError(
                f"the weights are not finite at step {self.step}: lower --rate, and run again from the last checkpoint"
            )

    def _write(self, **numbers: float) -> None:
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **numbers}) + "\n")

    def _validate(self) -> dict[str, float]:
        """Measure the averaged weights on the heads held out."""
        scores: dict[str, float] = {}
        kept = self._use_average()
        if self.accelerator.is_main_process:
            scores, pictures = self.source.validate(self.pipeline, self.out / "validation")
            if scores:
                self.accelerator.log(scores, step=self.step)
                self._write(**scores)
            for tracker in self.accelerator.trackers:
                named = {f"held out {index}": picture[None] for index, picture in enumerate(pictures)}
                tracker.log_images(named, step=self.step, dataformats="NHWC")
        kept()
        self.accelerator.wait_for_everyone()
        return scores

    def _use_average(self) -> Callable[[], None]:
        """Give the pipeline the averaged weights, where they are divided the main process's; return what undoes it."""
        if self.whole is None:
            self.average.exchange(self.denoiser)
            self.denoiser.eval()
            return lambda: self.average.exchange(self.denoiser)
        self.whole.gather(self.denoiser, self.average.weights)
        copy = self.whole.module
        if copy is None:
            return lambda: None
        copy.to(self.accelerator.device).eval()
        self.pipeline.unet = copy.unet
        if copy.image_encoder is not None:
            self.pipeline.image_encoder = copy.image_encoder

        def put_back() -> None:
            copy.cpu()

        return put_back
