"""The training run: prepare, steps with Accelerate, checkpoints, validation, and the folder that it leaves."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from gafext import images
from gafext.atomic import whole_folder
from gafext.cameras import Cameras
from gafext.conditions import latent_size
from gafext.errors import CheckpointError
from gafext.evaluation.measures import psnr, ssim
from gafext.models.unet import MultiViewUNet
from gafext.output import MultiViewOutput
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.training.batches import Batch, Sampling, draw_batch
from gafext.training.data import Head, read_heads, write_index
from gafext.training.denoiser import Denoiser, checkpoint_blocks, choose_trained
from gafext.training.latents import encode_heads

_STATE = "checkpoint"


@dataclass(frozen=True)
class Settings:
    """Settings of a run that are not its files or its `Sampling`.

    Attributes:
        train: weights to train, "new" or "all".
        steps: steps of the optimizer.
        rate: learning rate of AdamW.
        warmup: steps over which it rises.
        gamma: of min-SNR.
        ema: decay of the averaged weights, which are saved.
        accumulate: batches per step of the optimizer.
        checkpointing: recompute blocks in the backward pass.
        precision: "no", "fp16" or "bf16".
        save_every: steps between checkpoints.
        validation: heads that are held out, the last ones by name.
        validation_steps: denoising steps of their views.
        portrait_angle: degrees from the front within which a view may be the portrait.
        seed: seed of everything that is drawn.
        cpu: train on the CPU.
    """

    train: str = "new"
    steps: int = 10000
    rate: float = 1e-4
    warmup: int = 200
    gamma: float = 5.0
    ema: float = 0.999
    accumulate: int = 1
    checkpointing: bool = False
    precision: str = "no"
    save_every: int = 500
    validation: int = 1
    validation_steps: int = 25
    portrait_angle: float = 35.0
    seed: int = 0
    cpu: bool = False


SAMPLING, SETTINGS = Sampling(), Settings()


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

    def state_dict(self) -> dict[str, Any]:
        return {"steps": torch.tensor(self.steps), **self.weights}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        for name, weight in self.weights.items():
            weight.copy_(state[name])


def check_parent(pipeline: MultiViewDiffusionPipeline) -> None:
    """Raise a CheckpointError unless the parent has what `gafext assemble` adds, all of which is trained."""
    config = pipeline.unet.config
    attends = all(
        block.attn_ip is not None and block.attn_cv is not None for block in pipeline.unet.transformer_blocks()
    )
    if not attends or config.pose_dim is None or config.in_channels != 2 * config.out_channels:
        raise CheckpointError("parent: expected a checkpoint that gafext assemble wrote, got another; run it first")


def train(
    data: str | Path,
    parent: str | Path,
    out: str | Path,
    *,
    cache: str | Path | None = None,
    sampling: Sampling = SAMPLING,
    settings: Settings = SETTINGS,
) -> dict[str, float]:
    """Train a checkpoint that `gafext assemble` wrote; a run whose `out` has a checkpoint resumes there.

    Args:
        data: folder of heads, as for `read_heads`.
        parent: checkpoint folder.
        out: folder for `model/` (the trained checkpoint), `log.jsonl`, checkpoints and pictures of held-out heads.
        cache: folder for the encoded data; None: `out`/cache.
        sampling: how batches are drawn.
        settings: everything else.

    Returns:
        PSNR in dB and SSIM of the held-out heads; empty without any.

    Raises:
        ValueError: the data has faults, or the batch does not divide among the processes.
        CheckpointError: the parent cannot be read, or has not been assembled.
    """
    out = Path(out)
    accelerator = Accelerator(
        cpu=settings.cpu,
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=settings.train == "all")],
    )
    processes = accelerator.num_processes
    if sampling.batch % processes:
        raise ValueError(f"batch: expected a multiple of the {processes} processes, got {sampling.batch}")
    heads, faults = read_heads(data)
    if faults:
        raise ValueError(f"{faults[0]} ({len(faults)} faults; gafext train --check lists them)")
    if len(heads) <= settings.validation:
        raise ValueError(f"data: expected more than the {settings.validation} heads held out, got {len(heads)}")
    pipeline = MultiViewDiffusionPipeline.from_pretrained(parent, device=accelerator.device)
    check_parent(pipeline)
    size = latent_size(None, rows=1, channels=1, config=pipeline.unet.config) * pipeline.vae.config.factor
    known, held_out = heads[: len(heads) - settings.validation], heads[len(heads) - settings.validation :]
    folder = out / "cache" if cache is None else Path(cache)
    options = {"size": size, "degrees": settings.portrait_angle}
    with accelerator.main_process_first():  # the others read what it has written
        if accelerator.is_main_process:
            write_index(folder / "index.json", heads)
        encoded = encode_heads(known, pipeline, folder, **options)
    _run(accelerator, pipeline, encoded, out, sampling, settings)
    scores = {}
    if accelerator.is_main_process:
        scores = validate(pipeline, held_out, out / "validation", settings, views=sampling.views) if held_out else {}
        _publish(pipeline, out / "model", parent, settings, scores)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return scores


def _run(
    accelerator: Accelerator,
    pipeline: MultiViewDiffusionPipeline,
    encoded: list[dict[str, Tensor]],
    out: Path,
    sampling: Sampling,
    settings: Settings,
) -> None:
    """Take the steps, and leave the averaged weights in the pipeline."""
    unet = pipeline.unet.train()
    choose_trained(unet, settings.train)
    if settings.checkpointing:
        checkpoint_blocks(unet)
    average = Average(unet, settings.ema)
    trained = [p for p in unet.parameters() if p.requires_grad]
    # Without weight decay: it would change the channels of conv_in that "new" leaves alone.
    optimizer = torch.optim.AdamW(trained, lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.0)
    config = pipeline.solver.config
    denoiser = Denoiser(unet, config, prompt_embeds=pipeline.prompt_embeds, gamma=settings.gamma)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    accelerator.register_for_checkpointing(average)
    step = _resume(accelerator, out)
    waited, start, first = 0.0, time.monotonic(), step
    while step < settings.steps:
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, (step + 1) / max(settings.warmup, 1))
        losses = []
        for micro in range(settings.accumulate):
            before = time.monotonic()
            number = step * settings.accumulate + micro
            batch = draw_batch(
                encoded, number, sampling, seed=settings.seed, timesteps=config.num_train_timesteps
            ).part(accelerator.process_index, accelerator.num_processes)
            batch = Batch(*(getattr(batch, entry.name).to(accelerator.device) for entry in fields(batch)))
            waited += time.monotonic() - before
            with accelerator.accumulate(model):
                loss = model(batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean"))
        step += 1
        average.update(unet)
        _log(accelerator, out, step, torch.stack(losses).mean().item())
        if step % settings.save_every == 0 or step == settings.steps:
            _save(accelerator, out, step)
    seconds = time.monotonic() - start
    if step > first:
        seen = (step - first) * sampling.batch * settings.accumulate
        accelerator.print(f"{seen / seconds:.2f} heads per second, {100 * waited / seconds:.0f} % waiting for data")
    unet.load_state_dict(average.weights, strict=False)
    denoiser.release()
    unet.eval()


def _log(accelerator: Accelerator, out: Path, step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}: lower --rate, and run again from the last checkpoint")
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def _save(accelerator: Accelerator, out: Path, step: int) -> None:
    """Write a checkpoint and remove those before it."""
    temporary, final = out / f"{_STATE}.tmp", out / f"{_STATE}-{step:08d}"
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)  # whole or not at all
        for old in _checkpoints(out)[:-1]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _checkpoints(out: Path) -> list[Path]:
    return sorted(path for path in out.glob(f"{_STATE}-*") if path.is_dir())


def _resume(accelerator: Accelerator, out: Path) -> int:
    """Load the last checkpoint; return its step, or 0 without one."""
    found = _checkpoints(out)
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    step = int(found[-1].name.rpartition("-")[2])
    if accelerator.is_main_process and (out / "log.jsonl").is_file():  # steps after it are taken again
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (out / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    accelerator.print(f"{found[-1]}: resumed at step {step}")
    return step


@torch.no_grad()
def validate(
    pipeline: MultiViewDiffusionPipeline, heads: list[Head], folder: Path, settings: Settings, *, views: int
) -> dict[str, float]:
    """Generate views of held-out heads, write them beside the true ones, and measure them.

    Args:
        pipeline: the pipeline.
        heads: the heads.
        folder: folder for one picture per head: generated views above the true ones.
        settings: denoising steps, angle of the portrait, seed.
        views: number of views, spread over the cameras of a head.

    Returns:
        Mean PSNR in dB and SSIM.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = []
    for index, head in enumerate(heads):
        chosen = torch.linspace(0, len(head.pictures) - 1, min(views, len(head.pictures))).round().long().tolist()
        cameras = Cameras(head.cameras.w2c[chosen], intrinsics=head.cameras.intrinsics(1)[chosen], size=1)
        output = pipeline(
            head.picture(head.portraits(settings.portrait_angle)[0]),
            cameras,
            [head.normals[view] for view in chosen] if head.normals else None,
            num_views=len(chosen),
            num_inference_steps=settings.validation_steps,
            generator=settings.seed,
            upsample="none",
            output_type="pt",
            progress_bar=False,
        )
        assert isinstance(output, MultiViewOutput) and isinstance(output.images, Tensor)  # of one portrait, as asked
        made = output.images.cpu()
        true = images.to_square_tensor([head.picture(view) for view in chosen], made.shape[-1])
        scores.append((psnr(made, true).mean(), ssim(made, true).mean()))
        rows = torch.cat([torch.cat(list(made), dim=2), torch.cat(list(true), dim=2)], dim=1)
        images.to_pil(rows[None])[0].save(folder / f"{index:03d}.png")
    means = torch.tensor(scores).mean(0).tolist()
    return {"psnr": means[0], "ssim": means[1]}


def _publish(
    pipeline: MultiViewDiffusionPipeline, folder: Path, parent: str | Path, settings: Settings, scores: dict[str, float]
) -> None:
    """Write the trained checkpoint with a model card."""
    shutil.rmtree(folder, ignore_errors=True)
    with whole_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        measured = ", ".join(f"{name} {value:.4g}" for name, value in scores.items()) or "not measured"
        (temporary / "README.md").write_text(
            f"# Multi-view head checkpoint\n\nTrained by `gafext train` from `{parent}`: {settings.steps} steps, "
            f"weights trained: {settings.train}, seed {settings.seed}.\nHeld-out heads: {measured}.\n",
            encoding="utf-8",
        )
