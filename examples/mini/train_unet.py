"""Train the image encoder and the multi-view U-Net on latents of the trained autoencoder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training
from data import draw_heads, face_weights, generator, normalized, photographic, portrait_cameras, view_cameras
from export import GUIDANCE_SCALE, export, load_vae
from initial import carry_over, new_image_encoder
from rungs import Rung
from torch import Tensor, nn
from training import arguments, fast_in_bfloat16, mixed_precision, rung_of

from gafext import AutoencoderKL, DDIMScheduler, MultiViewDiffusionPipeline, MultiViewUNet, heads
from gafext.config import SD_SCHEDULE, SchedulerConfig
from gafext.evaluation import Evaluation, Scores, as_portrait
from gafext.models.head_fitter import HeadFitter
from gafext.ops.backend import set_attention_backend
from gafext.schedulers import schedule
from gafext.training.batches import Batch
from gafext.training.run import fit, start
from gafext.training.settings import Settings

POOL_VIEWS = 8  # views per head in the pool; a step uses 1, 2, 4 or 8
VIEWS = (1, 2, 1, 4, 1, 2, 1, 4, 1, 8)
"""Views per step, in turn. A step has as many latents each time, and few heads in it make gradients noisy: from random
weights, 150 steps of 16 heads with one view had 20.5 dB in one step from noise, of 4 heads with four views 18.9."""
PORTRAITS = 3  # portraits per head in the pool; a step uses one, and makes it look like a photograph or not
NO_IMAGE = 0.05  # fraction of the heads without image tokens, for guidance
SOME_IMAGES = 0.2  # fraction of the heads of several views for which each view has image tokens or not
NOISIEST = 0.35  # fraction of the heads at the last timestep, whose prediction generation starts from
APART = 0.3  # fraction of the others for which each view has its own noise level
NEUTRAL = 0.1  # fraction of the heads whose views have the neutral head's shape
FITTED = 0.4  # fraction whose views have the shape of the head that is fitted to the portrait

SAVE_EVERY, VALIDATE_EVERY = 200, 1000  # steps
ENDLESS = 10**9  # steps of a run that has a time limit alone

LEAST_SIGNAL = 2.0**-23
"""Least ᾱ but 0, for which the solvers over noise levels take 2^-24: noise has to grow up to there."""

SCHEDULE = replace(
    SD_SCHEDULE,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,  # generation starts from pure noise: the network has to predict the white background
    set_alpha_to_one=True,
    steps_offset=0,
)


def noisier(config: SchedulerConfig, divisor: float) -> SchedulerConfig:
    """Divide the signal-to-noise ratio of every timestep, also of one without signal (arXiv 2301.11093 section 2.1).

    Neighbouring pixels of larger latents agree more, and noise hides less of them: with n times the pixels it has to
    have n times the variance.
    """
    if divisor == 1:
        return config
    alphas = schedule.alphas_cumprod(config).double()
    alphas = alphas / (alphas + divisor * (1 - alphas))
    alphas[:-1].clamp_(min=LEAST_SIGNAL)
    betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
    return replace(config, trained_betas=tuple(betas.tolist()), rescale_betas_zero_snr=False)


@dataclass
class Pool:
    """Pool of encoded heads, each used several times, because rendering and encoding cost as much as a step."""

    latents: Tensor  # [K,8,C,h,w], scaled
    normals: Tensor  # [K,8,C,h,w], scaled
    weights: Tensor  # [K,8,1,h,w], of the loss
    poses: Tensor  # [K,8,12]
    portraits: Tensor  # [K,P,3,S,S] in [0,1], over white
    alphas: Tensor  # [K,P,1,S,S] of the portraits
    added: int = 0

    def enlarged(self, limit: int) -> Pool:
        """Return a pool with room for `limit` heads."""
        room = {name: x.new_empty(limit, *x.shape[1:]) for name, x in self.tensors().items()}
        pool = Pool(**room)
        pool.add(self)
        return pool

    @property
    def count(self) -> int:
        return min(self.added, len(self.latents))

    def add(self, fresh: Pool) -> None:
        """Add heads, in place of the oldest ones where the pool is full."""
        slots = (self.added + torch.arange(len(fresh.latents))) % len(self.latents)
        for name, tensor in self.tensors().items():
            tensor[slots] = fresh.tensors()[name]
        self.added += len(slots)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode images [N,V,3,S,S] in [0,1] to scaled latents [N,V,C,h,w] float32, as the pipeline does."""
    flat = (pictures * 2 - 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with mixed_precision(vae.device):
        mean = torch.cat([vae.encode(part)[0].float() for part in flat.split(256)])  # the first pool has thousands
    return ((mean - vae.config.shift_factor) * vae.config.scaling_factor).unflatten(0, pictures.shape[:2])


@dataclass(frozen=True)
class Source:
    """What new heads are made with."""

    vae: AutoencoderKL
    fitter: HeadFitter | None
    """Fits heads to portraits; None: the fraction FITTED has the neutral head's shape."""
    size: int
    """Side of the views in pixels."""
    portrait_size: int


def approximate(portraits: Tensor, source: Source, random: torch.Generator) -> tuple[Tensor, heads.Heads | None]:
    """Choose heads [N] bool whose views have another shape, as without a tracker, and return heads of those shapes.

    Args:
        portraits: [N,3,S,S] in [0,1].
        source: with the fitter.
        random: generator of the CPU.
    """
    drawn = torch.rand(len(portraits), generator=random)
    neutral, chosen = drawn < NEUTRAL, drawn < NEUTRAL + FITTED
    others = []
    for portrait, is_neutral in zip(portraits[chosen], neutral[chosen].tolist(), strict=True):
        known = is_neutral or source.fitter is None
        others.append(heads.neutral_head() if known else source.fitter.fit(as_portrait(portrait.cpu())))
    return chosen, heads.cat(others).to(portraits.device) if others else None


def reshaped(drawn: heads.Heads, chosen: Tensor, others: heads.Heads | None) -> heads.Heads:
    """Give the chosen heads the shapes of others, and keep their colours and light.

    The views of a head always agree with its normal maps, so that the U-Net learns to take the shape from these, also
    where the portrait shows another one. Where the maps of some heads disagree with their views, it hedges for all.
    """
    if others is None:
        return drawn
    shape = {name: getattr(drawn, name).clone() for name in ("centre", "inverse", "clip", "active")}
    for name, values in shape.items():
        values[chosen] = getattr(others, name)
    return replace(drawn, **shape)


def fresh_heads(count: int, random: torch.Generator, source: Source) -> Pool:
    """Render and encode new heads."""
    vae, size = source.vae, source.size
    drawn = draw_heads(count, random, vae.device)
    w2c = view_cameras(count, POOL_VIEWS, random)
    taken = heads.render(drawn, portrait_cameras(count, random, PORTRAITS), source.portrait_size)
    portraits = photographic(taken.rgb[:, 0], taken.alpha[:, 0], random)
    made = heads.render(reshaped(drawn, *approximate(portraits, source, random)), w2c, size)
    return Pool(
        encode(vae, made.rgb),
        encode(vae, made.normals),
        face_weights(made.face.flatten(0, 1), vae.config.factor).unflatten(0, made.face.shape[:2]),
        w2c[..., :3, :].flatten(2).float().to(vae.device),
        taken.rgb,
        taken.alpha,
    )


def show(evaluation: Evaluation, path: Path) -> dict[str, float]:
    """Evaluate the views of held-out heads, and write them to an image."""
    made = evaluation.generate()
    evaluation.figure(made).save(path)
    who = evaluation.subjects
    own = Scores.of("own", who, made)
    fitted = Scores.of("fitted", who, evaluation.generate(normals=lambda subject: None))
    copy = Scores.of("copy", who, [subject.portrait.expand_as(subject.views.rgb) for subject in who])
    numbers = {"own": own.psnr, "own_ssim": own.ssim, "own_face": own.face, "own_sharpness": own.sharpness}
    return numbers | {"fitted": fitted.psnr, "copy": copy.psnr}


class DrawnHeads:
    """Batches of heads that are drawn while the U-Net trains, as a source of `gafext.training`.

    Args:
        source: what new heads are made with.
        rung: sizes of the batches and of the pool.
        timesteps: number of training timesteps.
        seed: seed of the run.
        out: folder of all stages, for `model/`, `unet.json` and `unet.png`.
    """

    def __init__(self, source: Source, rung: Rung, *, timesteps: int, seed: int, out: Path):
        self.source, self.rung, self.timesteps, self.seed, self.out = source, rung, timesteps, seed, out
        drawn = fresh_heads(rung.pool_heads, generator(seed + 1, 0), source)
        self.pool = drawn.enlarged(rung.pool_limit or rung.pool_heads)

    @property
    def described(self) -> dict[str, Any]:
        fitted = self.source.fitter is not None
        return {"data": f"drawn heads, {self.source.size} pixels, fitted: {fitted}", "held_out": []}

    def batches(self, numbers: range, *, process: int, processes: int) -> Iterator[Batch]:
        for number in numbers:
            yield self.draw(number).part(process, processes)

    def draw(self, step: int) -> Batch:
        device = self.source.vae.device
        random, noises = generator(self.seed, step), generator(self.seed + 2, step, device)
        if step % self.rung.fresh_every == 0:
            self.pool.add(fresh_heads(self.rung.fresh_heads, random, self.source))
        views = VIEWS[step % len(VIEWS)]
        count = self.rung.unet_batch // views
        chosen = torch.randint(self.pool.count, (count,), generator=random).to(device)
        first = int(torch.randint(POOL_VIEWS // views, (1,), generator=random))
        seen = slice(first, None, POOL_VIEWS // views)
        pooled = (self.pool.latents, self.pool.normals, self.pool.weights, self.pool.poses)
        latents, normals, weights, poses = (x[chosen][:, seen] for x in pooled)
        portrait = torch.randint(PORTRAITS, (count,), generator=random).to(device)
        portraits, alphas = (x[chosen, portrait] for x in (self.pool.portraits, self.pool.alphas))
        return Batch(
            latents=latents,
            normals=normals,
            weights=weights,
            pose=poses,
            features=None,
            portraits=normalized(photographic(portraits, alphas, random)),
            noise=torch.randn(latents.shape, generator=noises, device=device),
            timesteps=choose_timesteps(count, views, self.timesteps, random),
            sees=choose_seeing(count, views, random),
        )

    def validate(self, pipeline: MultiViewDiffusionPipeline, folder: Path) -> tuple[dict[str, float], list[np.ndarray]]:
        """Export the averaged weights, and measure them on heads that are held out."""
        for module in (pipeline.unet, pipeline.image_encoder):
            set_attention_backend(module, "auto")
        parts = {name: getattr(pipeline, name) for name in ("unet", "image_encoder", "scheduler")}
        export(self.out, **parts)
        evaluation = Evaluation(pipeline, self.rung.measured_heads, num_inference_steps=20, upsample="none")
        numbers = show(evaluation, self.out / "unet.png")
        train_fast(pipeline)
        write_curves(folder.parent / "log.jsonl", self.out / "unet.json", numbers)
        return numbers, []


def choose_timesteps(count: int, views: int, timesteps: int, random: torch.Generator) -> Tensor:
    """Choose timesteps [count,views]: the last one, one for all views of a head, or one for each."""
    chosen = torch.randint(timesteps, (count, views), generator=random)
    apart = torch.rand(count, 1, generator=random) < APART
    noisiest = torch.rand(count, 1, generator=random) < NOISIEST
    return torch.where(apart, chosen, chosen[:, :1]).masked_fill(noisiest, timesteps - 1)


def choose_seeing(count: int, views: int, random: torch.Generator) -> Tensor:
    """Choose which views attend to the portrait, of a head all, none, or a random subset: [count,views] of 0 and 1."""
    kind, each = torch.rand(count, 1, generator=random), torch.rand(count, views, generator=random) < 0.5
    none, some = kind < NO_IMAGE, kind < NO_IMAGE + SOME_IMAGES * (views > 1)
    return torch.where(some, each & ~none, True).float()


def train_fast(pipeline: MultiViewDiffusionPipeline) -> None:
    """Choose the attention whose backward pass is fast: on a CPU, PyTorch's takes twice as long as a formula."""
    set_attention_backend(pipeline.unet, "reference" if pipeline.device.type == "cpu" else "auto")


def write_curves(log: Path, path: Path, numbers: dict[str, float]) -> None:
    """Write the mean losses of a run's log, and what was measured at its last step, as the other stages do."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    losses = [line for line in lines if "loss" in line]
    curves = [entry for entry in before if "loss" not in entry and losses and entry["step"] < losses[-1]["step"]]
    for first in range(0, len(losses), training.RECORD):
        part = losses[first : first + training.RECORD]
        mean = sum(line["loss"] for line in part) / len(part)
        curves.append({"step": part[-1]["step"], "seconds": part[-1]["seconds"], "loss": float(f"{mean:.5g}")})
    if losses:
        rounded = {name: float(f"{value:.5g}") for name, value in numbers.items()}
        curves.append({"step": losses[-1]["step"], "seconds": losses[-1]["seconds"], **rounded})
    path.write_text(
        json.dumps(sorted(curves, key=lambda entry: (entry["step"], "loss" not in entry)), indent=0), encoding="utf-8"
    )


def untrained(out: Path, rung: Rung, parent: Path | None, device: torch.device) -> MultiViewDiffusionPipeline:
    """Put a new U-Net and image encoder around the trained autoencoder and fitter.

    Args:
        out: folder of all stages.
        rung: sizes of the networks.
        parent: model whose weights are carried over; None: none.
        device: device of the networks.
    """
    taught = out / "image_encoder"
    taught = taught if taught.is_dir() else parent and parent / "image_encoder"
    unet, encoder = MultiViewUNet(rung.unet), new_image_encoder(rung.image_encoder, taught)
    if parent:
        weights = MultiViewUNet.from_pretrained(parent / "unet").state_dict()
        carry_over(unet, weights)
        if unet.add_embedding and "add_embedding.image_norm.weight" not in weights:
            nn.init.zeros_(unet.add_embedding.image_norm.weight)  # the U-Net is the parent's to begin with
    unet, encoder = (module.to(device, memory_format=torch.channels_last) for module in (unet, encoder))
    fitter = out / "model" / "head_fitter"
    fitter = HeadFitter.from_pretrained(fitter) if fitter.is_dir() else None
    if fitter is None:
        print(f"{out}/model/head_fitter: none; the neutral head's shape takes the place of fitted ones")
    return MultiViewDiffusionPipeline(
        vae=load_vae(out, device),
        unet=unet,
        image_encoder=encoder,
        scheduler=DDIMScheduler(noisier(SCHEDULE, rung.snr_divisor)),
        head_fitter=fitter,
        guidance_scale=GUIDANCE_SCALE,
    )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, intervals=False).parse_args(argv)
    rung, device = rung_of(args), torch.device(args.device)
    settings = Settings(
        train="all",
        steps=args.steps or ENDLESS,
        minutes=args.minutes,
        rate=rung.unet_rate,
        encoder_rate=rung.encoder_rate,
        schedule="wsd",
        gamma=math.inf,  # all noise levels count alike
        precision="bf16" if fast_in_bfloat16(device) else "no",
        save_every=SAVE_EVERY,
        validate_every=VALIDATE_EVERY,
        seed=args.seed,
        cpu=device.type == "cpu",
    )
    out = args.out / "unet"
    accelerator = start(out, settings)
    torch.manual_seed(args.seed)
    pipeline = untrained(args.out, rung, args.start, accelerator.device)
    train_fast(pipeline)
    source = DrawnHeads(
        Source(pipeline.vae, pipeline.head_fitter, rung.image_size, rung.image_encoder.image_size),
        rung,
        timesteps=pipeline.solver.config.num_train_timesteps,
        seed=args.seed,
        out=args.out,
    )
    fit(accelerator, pipeline, source, out, parent=args.start or "random weights", settings=settings)


if __name__ == "__main__":
    main()
