"""Train the image encoder and the multi-view U-Net on latents of the trained autoencoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from data import draw_heads, face_weights, generator, photographic, portrait_cameras, view_cameras
from export import GUIDANCE_SCALE, export, load_vae
from initial import carry_over
from torch import Tensor, nn
from training import Trainer, arguments, mixed_precision, rung_of

from gafext import AutoencoderKL, CLIPVisionEncoder, DDIMScheduler, MultiViewDiffusionPipeline, MultiViewUNet, heads
from gafext.config import SD_SCHEDULE, SchedulerConfig
from gafext.evaluation import Evaluation, Scores, as_portrait
from gafext.models.clip import MEAN, STD
from gafext.models.head_fitter import HeadFitter
from gafext.ops.backend import set_attention_backend
from gafext.schedulers import schedule

POOL_VIEWS = 8  # views per head in the pool; a step uses 1, 2, 4 or 8
VIEWS = (4, 4, 4, 8, 4, 2, 4, 8, 4, 1)  # views per step, in turn
NO_IMAGE = 0.1  # fraction of the heads without image tokens, for guidance
SOME_IMAGES = 0.5  # fraction of the heads for which each view has image tokens or not
APART = 0.3  # fraction of the heads for which each view has its own noise level
NEUTRAL = 0.1  # fraction of the heads whose normal maps are the neutral head's
FITTED = 0.4  # fraction whose normal maps are of the head that is fitted to the portrait

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
    portraits: Tensor  # [K,3,S,S], normalised for the image encoder
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
    """Fits heads to portraits; None: the normal maps of the fraction FITTED are the neutral head's."""
    size: int
    """Side of the views in pixels."""
    portrait_size: int


def approximate(portraits: Tensor, source: Source, random: torch.Generator) -> tuple[Tensor, heads.Heads | None]:
    """Choose heads [N] bool whose normal maps are of another head, as without a tracker, and return those others.

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


def fresh_heads(count: int, random: torch.Generator, source: Source) -> Pool:
    """Render and encode new heads."""
    vae, size = source.vae, source.size
    drawn = draw_heads(count, random, vae.device)
    w2c = view_cameras(count, POOL_VIEWS, random)
    made = heads.render(drawn, w2c, size)
    mean, std = (torch.tensor(values, device=vae.device).view(3, 1, 1) for values in (MEAN, STD))
    taken = heads.render(drawn, portrait_cameras(count, random), source.portrait_size)
    portraits = photographic(taken.rgb[:, 0], taken.alpha[:, 0], random)
    chosen, others = approximate(portraits, source, random)
    if others is not None:
        made.normals[chosen] = heads.render(others, w2c[chosen], size).normals
    return Pool(
        encode(vae, made.rgb),
        encode(vae, made.normals),
        face_weights(made.face.flatten(0, 1), vae.config.factor).unflatten(0, made.face.shape[:2]),
        w2c[..., :3, :].flatten(2).float().to(vae.device),
        (portraits - mean) / std,
    )


def diffuse(clean: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the noised latents for latents [N,C,h,w] at ᾱ [N], and v, the prediction's target."""
    signal, level = alphas_cumprod.sqrt().view(-1, 1, 1, 1), (1 - alphas_cumprod).sqrt().view(-1, 1, 1, 1)
    return signal * clean + level * noise, signal * noise - level * clean


class Blindfold:
    """Remove image attention from some views, which then need the identity from other views through attn_cv.

    If all views attend to the portrait, the U-Net does not learn to use attn_cv.
    """

    def __init__(self, unet: MultiViewUNet):
        self.sees: Tensor | None = None  # [B*V,1,1] of 0 and 1
        for block in unet.transformer_blocks():
            block.attn_ip.register_forward_hook(self)

    def __call__(self, attn_ip: nn.Module, inputs: object, attended: Tensor) -> Tensor:
        return attended * self.sees if attn_ip.training else attended

    def choose(self, count: int, views: int, random: torch.Generator, device: torch.device) -> None:
        """Choose the views of a step that attend to the portrait: per head all, none, or a random subset."""
        kind, each = torch.rand(count, 1, generator=random), torch.rand(count, views, generator=random) < 0.5
        none, some = kind < NO_IMAGE, kind < NO_IMAGE + SOME_IMAGES
        sees = torch.where(some, each & ~none, True)
        self.sees = sees.float().view(-1, 1, 1).to(device)


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


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    rung, device = rung_of(args), torch.device(args.device)
    torch.manual_seed(args.seed)
    vae = load_vae(args.out, device)
    unet, encoder = MultiViewUNet(rung.unet), CLIPVisionEncoder(rung.image_encoder)
    nn.init.normal_(encoder.vision_model.embeddings.position_embedding.weight, std=0.02)  # 1 would dominate the patches
    if args.start:
        carry_over(unet, MultiViewUNet.from_pretrained(args.start / "unet").state_dict())
        carry_over(encoder, CLIPVisionEncoder.from_pretrained(args.start / "image_encoder").state_dict())
    unet, encoder = (module.to(device, memory_format=torch.channels_last) for module in (unet, encoder))
    if device.type == "cpu":  # the backward pass of PyTorch's attention takes twice as long on a CPU
        set_attention_backend(unet, "reference")
    noise_schedule = noisier(SCHEDULE, rung.snr_divisor)
    alphas = schedule.alphas_cumprod(noise_schedule).to(device)
    blindfold = Blindfold(unet)
    fitter = args.out / "model" / "head_fitter"
    fitter = HeadFitter.from_pretrained(fitter) if fitter.is_dir() else None
    if fitter is None:
        print(f"{args.out}/model/head_fitter: none; the neutral head's normal maps take the place of fitted ones")
    source = Source(vae, fitter, rung.image_size, rung.image_encoder.image_size)
    drawn = fresh_heads(rung.pool_heads, generator(args.seed + 1, 0), source)
    pool = drawn.enlarged(rung.pool_limit or rung.pool_heads)

    def loss(step: int) -> Tensor:
        random, noises = generator(args.seed, step), generator(args.seed, step, device)
        if step % rung.fresh_every == 0:
            pool.add(fresh_heads(rung.fresh_heads, random, source))
        views = VIEWS[step % len(VIEWS)]
        count = rung.unet_batch // views
        chosen = torch.randint(pool.count, (count,), generator=random).to(device)
        first = int(torch.randint(POOL_VIEWS // views, (1,), generator=random))
        seen = slice(first, None, POOL_VIEWS // views)
        pooled = (pool.latents, pool.normals, pool.weights, pool.poses)
        clean, normals, weights, poses = (x[chosen][:, seen].flatten(0, 1) for x in pooled)
        timesteps = torch.randint(len(alphas), (count, views), generator=random)
        apart = torch.rand(count, 1, generator=random) < APART
        timesteps = torch.where(apart, timesteps, timesteps[:, :1]).flatten().to(device)
        noise = torch.randn(clean.shape, generator=noises, device=device)
        noised, wanted = diffuse(clean, noise, alphas[timesteps])
        sample = torch.cat([noised, normals], dim=1).contiguous(memory_format=torch.channels_last)
        blindfold.choose(count, views, random, device)
        with mixed_precision(device):
            tokens = unet.image_projection(encoder(pool.portraits[chosen]).last_hidden_state)
            conditioning = unet.precompute(pose=poses, image_embeds=tokens)
            predicted = unet(sample, timesteps, conditioning=conditioning, num_views=views).float()
        return (weights * (predicted - wanted).square()).mean()

    def measure(averaged: dict[str, nn.Module], step: int) -> dict[str, float]:
        for module in averaged.values():
            set_attention_backend(module, "auto")
        parts = {"vae": vae, "scheduler": DDIMScheduler(noise_schedule), "head_fitter": source.fitter}
        pipe = MultiViewDiffusionPipeline(guidance_scale=GUIDANCE_SCALE, **parts, **averaged)
        export(args.out, unet=averaged["unet"], image_encoder=averaged["image_encoder"], scheduler=pipe.scheduler)
        evaluation = Evaluation(pipe, rung.measured_heads, num_inference_steps=20, upsample="none")
        return show(evaluation, args.out / "unet.png")

    Trainer(
        "unet",
        args,
        {"unet": unet, "image_encoder": encoder},
        rate=rung.unet_rate,
        slow=(encoder, unet.image_projection),
        slow_rate=rung.encoder_rate,
        loss=loss,
        measure=measure,
    ).run()


if __name__ == "__main__":
    main()
