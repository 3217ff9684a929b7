"""The training run: prepare, steps with Accelerate, checkpoints, validation, and the folder that it leaves."""

from __future__ import annotations

import importlib.util
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from gafext.conditions import latent_size
from gafext.errors import CheckpointError
from gafext.families import family_name, family_of
from gafext.guidance import check_guidance_scale
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.training.batches import Batch, Sampling, Steps
from gafext.training.checkpoints import Average, describe, resume, save
from gafext.training.checks import unframed
from gafext.training.data import hold_out, read_heads
from gafext.training.denoiser import Denoiser
from gafext.training.head import Head
from gafext.training.latents import EncodedHead, cache_key, encode_heads
from gafext.training.settings import Settings
from gafext.training.trained import choose_trained, merge_updates, recomputing
from gafext.training.validation import publish, validate

SAMPLING, SETTINGS = Sampling(), Settings()
_PATIENCE = timedelta(days=1)  # of processes that wait for the one that validates; a dead one ends the run
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_READERS = 2  # processes that read ahead of a GPU; on the CPU they would take the training's cores


def check_parent(pipeline: MultiViewDiffusionPipeline, which: str) -> None:
    """Raise an error unless the parent can be trained.

    Args:
        pipeline: the parent.
        which: weights to train, as `Settings.train`.

    Raises:
        CheckpointError: it neither has what `gafext assemble` adds to single-view parents nor is ImageDream's.
        ValueError: there are no new layers to train.
    """
    config = pipeline.unet.config
    if family_of(config).has_reference_frame(config):
        if which == "new":
            raise ValueError("train: expected lora or all for ImageDream's checkpoint, without new layers, got new")
        return
    attends = all(
        block.attn_ip is not None and block.attn_cv is not None for block in pipeline.unet.transformer_blocks()
    )
    if not attends or config.pose_dim is None or not pipeline.takes_normals:
        raise CheckpointError(
            "parent: expected ImageDream's checkpoint, or one of single-view parents that gafext assemble wrote, got "
            f"another ({family_name(config)}); run it first; MV-Adapter, FaceLift and MVDream are not trainable"
        )


def train(
    data: str | Path,
    parent: str | Path,
    out: str | Path,
    *,
    cache: str | Path | None = None,
    sampling: Sampling = SAMPLING,
    settings: Settings = SETTINGS,
) -> dict[str, float]:
    """Train a checkpoint of `gafext assemble` or ImageDream's; a run whose `out` has a checkpoint resumes there.

    Args:
        data: folder of heads, as for `read_heads`.
        parent: checkpoint folder.
        out: folder for `model/` (the trained checkpoint), `log.jsonl`, TensorBoard's events where it is installed,
            checkpoints and pictures of held-out heads.
        cache: folder for the encoded data; None: `out`/cache.
        sampling: how batches are drawn.
        settings: everything else.

    Returns:
        PSNR in dB and SSIM of the held-out heads, and LPIPS where the package lpips is installed; empty without any.

    Raises:
        ValueError: the data has faults, the batch does not divide among the processes, the loss is not finite, or
            Accelerate is set to divide the weights among processes.
        CheckpointError: the parent cannot be read, or has not been assembled; or a checkpoint in `out` is of a run that
            trained other weights or held other heads out.
    """
    out = Path(out)
    if Path(parent).resolve() == (out / "model").resolve():
        raise ValueError(f"parent: expected another folder than the result's, got {parent}")
    if settings.guidance is not None:
        check_guidance_scale(settings.guidance)
    if settings.adam_8bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("adam_8bit: expected bitsandbytes, which is not installed: pip install bitsandbytes")
    accelerator = _accelerator(out, settings)
    if sampling.batch % accelerator.num_processes:
        count = accelerator.num_processes
        raise ValueError(f"batch: expected a multiple of the {count} processes, got {sampling.batch}")
    heads, faults = read_heads(data, views=sampling.views)
    if faults:
        raise ValueError(f"{faults[0]} ({len(faults)} faults; gafext train --check lists them)")
    known, held_out = hold_out(heads, settings.validation)
    pipeline = MultiViewDiffusionPipeline.from_pretrained(parent, device=accelerator.device)
    pipeline.head_fitter = None  # it fits drawn heads; data without normal maps is trained with the neutral head's
    check_parent(pipeline, settings.train)
    if settings.guidance is not None:
        pipeline.guidance_scale = settings.guidance
    if accelerator.is_main_process and pipeline.takes_normals and (warning := unframed([*known, *held_out])):
        warnings.warn(warning, stacklevel=2)
    size = latent_size(None, rows=1, channels=1, config=pipeline.unet.config) * pipeline.vae.config.factor
    options = {"size": size, "degrees": settings.portrait_angle}
    key = cache_key(known, pipeline, **options)
    folder = (out / "cache" if cache is None else Path(cache)) / key
    encode_heads(
        known, pipeline, folder, **options, every=slice(accelerator.process_index, None, accelerator.num_processes)
    )
    accelerator.wait_for_everyone()
    encoded = encode_heads(
        known, pipeline, folder, **options
    )  # those of the others, anew on a disk that they do not write
    described = describe(
        pipeline.unet, settings, sampling, precision=accelerator.mixed_precision, data=key, held_out=held_out
    )
    run = Run(accelerator, pipeline, out, held_out, described, sampling=sampling, settings=settings)
    scores = run.take_steps(encoded)
    if accelerator.is_main_process:
        publish(pipeline, out / "model", parent, settings, run.step, scores)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return scores


def _accelerator(out: Path, settings: Settings) -> Accelerator:
    watched = importlib.util.find_spec("tensorboard") is not None
    accelerator = Accelerator(
        cpu=settings.cpu,
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulate,
        kwargs_handlers=[
            # Without text, attn2 adds its bias alone: its other weights get no gradient.
            DistributedDataParallelKwargs(find_unused_parameters=settings.train != "new"),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
        log_with="tensorboard" if watched else None,
        project_dir=out,
    )
    if accelerator.distributed_type in _SHARDED:
        raise ValueError(
            f"accelerate: expected whole weights on every device, got {accelerator.distributed_type.value}"
        )
    return accelerator


def _optimizer(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    # Without weight decay: it would change the channels of conv_in that "new" leaves alone.
    options: dict[str, Any] = {"lr": settings.rate, "betas": (0.9, 0.99), "weight_decay": 0.0}
    if not settings.adam_8bit:
        return torch.optim.AdamW(parameters, **options)
    return importlib.import_module("bitsandbytes.optim").AdamW8bit(parameters, **options)


class Run:
    """Steps of a run.

    Args:
        accelerator: devices and processes.
        pipeline: the parent, whose U-Net is trained in place.
        out: folder of the run.
        held_out: heads of the validation.
        described: the run, as `describe` does.
        sampling, settings: as for `train`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: MultiViewDiffusionPipeline,
        out: Path,
        held_out: list[Head],
        described: dict[str, Any],
        *,
        sampling: Sampling,
        settings: Settings,
    ):
        self.accelerator, self.pipeline, self.out, self.held_out = accelerator, pipeline, out, held_out
        self.sampling, self.settings = sampling, settings
        self.unet, config = pipeline.unet, pipeline.solver.config
        self.described = described
        choose_trained(self.unet, settings.train, rank=settings.rank, seed=settings.seed)
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        self.average = Average(self.unet, settings.ema)
        self.timesteps = config.num_train_timesteps
        self.denoiser = Denoiser(self.unet, config, prompt_embeds=pipeline.prompt_embeds, gamma=settings.gamma)
        self.model, self.optimizer = accelerator.prepare(self.denoiser, _optimizer(self.trained, settings))
        accelerator.register_for_checkpointing(self.average)
        self.step = resume(accelerator, out, self.described)
        if accelerator.log_with:
            accelerator.init_trackers("tensorboard")
        self.waited = 0.0

    def take_steps(self, encoded: list[EncodedHead]) -> dict[str, float]:
        """Take the steps that are left, leave the averaged weights in the U-Net, and return the last validation."""
        batches, first, start = self._batches(encoded), self.step, time.monotonic()
        bar = tqdm(total=self.settings.steps, initial=first, disable=not self.accelerator.is_main_process, unit="step")
        scores, validated = {}, -1
        with recomputing(self.unet, self.settings.checkpointing), self.denoiser:
            done = self._done(start)
            while not done:
                loss = self._step(batches)
                self._log(loss)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if self.settings.validate_every and self.step % self.settings.validate_every == 0:
                    scores, validated = self._validate(), self.step
                done = self._done(start)
                if done or self.step % self.settings.save_every == 0:
                    save(self.accelerator, self.out, self.step, self.described)
        bar.close()
        if self.step > first:
            seen = (self.step - first) * self.sampling.batch * self.settings.accumulate
            seconds = time.monotonic() - start
            share = 100 * self.waited / seconds
            self.accelerator.print(f"{seen / seconds:.2f} heads per second, {share:.0f} % waiting for data")
        if validated != self.step:
            scores = self._validate()
        self.average.exchange(self.unet)
        merge_updates(self.unet)
        self.unet.eval()
        return scores

    def _batches(self, encoded: list[EncodedHead]) -> Iterator[Batch]:
        steps = Steps(
            encoded,
            self.sampling,
            seed=self.settings.seed,
            timesteps=self.timesteps,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        accumulate = self.settings.accumulate
        numbers = range(self.step * accumulate, self.settings.steps * accumulate)
        workers = 0 if self.accelerator.device.type == "cpu" else _READERS
        return iter(DataLoader(steps, batch_size=None, sampler=numbers, num_workers=workers))

    def _done(self, start: float) -> bool:
        if self.step >= self.settings.steps or self.settings.minutes is None:
            return self.step >= self.settings.steps
        passed = torch.tensor((time.monotonic() - start) / 60, device=self.accelerator.device)
        mean = cast(Tensor, self.accelerator.reduce(passed, "mean"))  # the same on every process
        return mean.item() >= self.settings.minutes

    def _step(self, batches: Iterator[Batch]) -> float:
        """Take a step of the optimizer; return the loss of the whole batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.step)
        self.unet.train()
        losses = []
        for _ in range(self.settings.accumulate):
            before = time.monotonic()
            batch = next(batches).to(self.accelerator.device)
            self.waited += time.monotonic() - before
            with self.accelerator.accumulate(self.model):
                loss = self.model(batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(self.accelerator.reduce(loss.detach(), "mean"))
        self.step += 1
        self.average.update(self.unet)
        return torch.stack(losses).mean().item()

    def _log(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}: lower --rate, and run again from the last checkpoint"
            )
        self.accelerator.log({"loss": loss}, step=self.step)
        self._write(loss=loss)

    def _write(self, **numbers: float) -> None:
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **numbers}) + "\n")

    def _validate(self) -> dict[str, float]:
        """Measure the averaged weights on the held-out heads."""
        if not self.held_out:
            return {}
        scores: dict[str, float] = {}
        if self.accelerator.is_main_process:
            with self._averaged():
                folder = self.out / "validation"
                scores, pictures = validate(
                    self.pipeline, self.held_out, folder, self.settings, views=self.sampling.views
                )
            self.accelerator.log(scores, step=self.step)
            for tracker in self.accelerator.trackers:
                named = {f"held out {index}": picture[None] for index, picture in enumerate(pictures)}
                tracker.log_images(named, step=self.step, dataformats="NHWC")
            self._write(**scores)
        self.accelerator.wait_for_everyone()
        return scores

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Use the averaged weights."""
        self.average.exchange(self.unet)
        self.unet.eval()
        try:
            yield
        finally:
            self.average.exchange(self.unet)
