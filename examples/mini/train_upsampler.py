"""Train the x2 upsampler, which predicts latents of an image at twice its size."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from data import draw_heads, face_weights, generator, view_cameras
from export import export, load_vae
from initial import carry_over, start_linear
from PIL import Image
from torch import Tensor, nn
from train_unet import encode
from training import Trainer, arguments, mixed_precision, rung_of

from gafext import LatentUpsampler, heads
from gafext.config import SD_X2_SCHEDULE
from gafext.evaluation.measures import psnr
from gafext.models.k_unet import KUNet
from gafext.schedulers import EulerDiscreteScheduler
from gafext.upsampler import LEVEL_CHANNELS, PromptEmbeds

NOISE = 0.15  # largest noise level added to the small latents: the U-Net's latents are noisier than encoded ones

SCHEDULE = replace(SD_X2_SCHEDULE, num_train_timesteps=3, beta_start=0.8, beta_end=0.8)
"""Noise levels from 11 down to 2; the last step takes the prediction at 2. Smaller levels left artefacts."""


def diffuse(clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the input of LatentUpsampler's network for latents [N,C,h,w] at σ [N,1,1,1], and its target F.

    D = x s² + σ s F equals the clean latents, with x = clean + σ noise and s = 1/√(σ²+1).
    """
    x, scale = clean + sigma * noise, (sigma.square() + 1).rsqrt()
    return x * scale, (clean - x * scale**2) / (sigma * scale)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    rung, device = rung_of(args), torch.device(args.device)
    torch.manual_seed(args.seed)
    vae, unet = load_vae(args.out, device), KUNet(rung.upsampler)
    start_linear(unet, zero=(".conv2.",))
    if args.start:
        carry_over(unet, KUNet.from_pretrained(args.start / "upsampler" / "unet").state_dict())
    unet = unet.to(device, memory_format=torch.channels_last)
    width, pooled = rung.upsampler.cross_attention_dim, rung.upsampler.time_cond_proj_dim - LEVEL_CHANNELS
    empty = PromptEmbeds(torch.zeros(1, 1, width, device=device), torch.zeros(1, pooled, device=device))
    condition = torch.cat([torch.ones(1, LEVEL_CHANNELS // 2), torch.zeros(1, LEVEL_CHANNELS // 2 + pooled)], dim=1)
    condition = condition.to(device)
    scheduler = EulerDiscreteScheduler(SCHEDULE)
    scheduler.set_timesteps(1000)
    largest, *_, smallest = scheduler.sigmas[:-1].tolist()

    def pairs(who: heads.Heads, w2c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode one view of each head at both sizes.

        Returns:
            Small latents, large latents, the large latents' weights in the loss, the large image.
        """
        large = heads.render(who, w2c, 2 * rung.image_size)
        small = F.avg_pool2d(large.rgb[:, 0], 2)[:, None]
        weights = face_weights(large.face[:, 0], vae.config.factor)
        return encode(vae, small)[:, 0], encode(vae, large.rgb)[:, 0], weights, large.rgb[:, 0]

    def fresh(count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return pairs(draw_heads(count, random, device), view_cameras(count, 1, random))[:3]

    # A pool as for the U-Net: each head is used several times, because rendering costs more than a step.
    pool = fresh(rung.upsampler_pool, generator(args.seed + 1, 0))

    def loss(step: int) -> Tensor:
        random, noises = generator(args.seed, step), generator(args.seed + 2, step, device)
        if step % rung.upsampler_fresh_every == 0:
            replaced = step // rung.upsampler_fresh_every * rung.upsampler_fresh
            oldest = (replaced + torch.arange(rung.upsampler_fresh)) % rung.upsampler_pool
            for kept, new in zip(pool, fresh(rung.upsampler_fresh, random), strict=True):
                kept[oldest] = new
        count = rung.upsampler_batch
        chosen = torch.randint(rung.upsampler_pool, (count,), generator=random).to(device)
        small, clean, weights = (kept[chosen] for kept in pool)
        where = torch.rand(count, 1, 1, 1, generator=random).to(device)
        sigma = smallest * (largest / smallest) ** where
        noised, wanted = diffuse(clean, torch.randn(clean.shape, generator=noises, device=device), sigma)
        level = NOISE * torch.rand(count, 1, 1, 1, generator=random).to(device)
        small = small + level * torch.randn(small.shape, generator=noises, device=device)
        sample = torch.cat([noised, F.interpolate(small, scale_factor=2.0, mode="nearest")], dim=1)
        with mixed_precision(device):
            text = empty.prompt_embeds
            made = unet(
                sample.contiguous(memory_format=torch.channels_last), sigma.flatten().log() / 4, text, condition
            )
        return (weights * (made[:, :-1].float() - wanted).square()).mean()

    held_out = heads.make_heads(heads.TEST_IDENTITIES[: rung.measured_heads], device)
    truth = pairs(held_out, view_cameras(len(held_out), 1, generator(10**6, 1)))

    @torch.no_grad()
    def measure(averaged: dict[str, nn.Module], step: int) -> dict[str, float]:
        upsampler = LatentUpsampler(averaged["unet"], EulerDiscreteScheduler(SCHEDULE), empty_prompt=empty).eval()
        if (args.out / "model" / "unet").is_dir():
            export(args.out, upsampler=upsampler)
        small, _, _, large = truth

        def decoded(latents: Tensor) -> Tensor:
            latents = latents / vae.config.scaling_factor + vae.config.shift_factor
            return torch.cat([vae.decode(part) for part in latents.split(4)]) / 2 + 0.5

        made, plain = decoded(upsampler(small)), decoded(F.interpolate(small, scale_factor=2.0, mode="bilinear"))
        sheet = torch.cat([torch.cat(list(row[:8].clamp(0, 1)), dim=2) for row in (plain, made, large)], dim=1)
        Image.fromarray((sheet.permute(1, 2, 0).cpu() * 255).byte().numpy()).save(args.out / "upsampler.png")
        pictures = {"upsampled": made, "bilinear": plain, "codec": decoded(truth[1])}
        return {name: psnr(pictures, large).mean().item() for name, pictures in pictures.items()}

    Trainer("upsampler", args, {"unet": unet}, rate=rung.upsampler_rate, loss=loss, measure=measure).run()


if __name__ == "__main__":
    main()
