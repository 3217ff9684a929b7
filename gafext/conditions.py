"""A run of the pipeline between `prepare` and `finish`: what the U-Net is conditioned on, and how a step asks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from gafext.cameras import Cameras
from gafext.families import family_of
from gafext.guidance import guide
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import Conditioning, MultiViewUNet
from gafext.schedulers import Scheduler


@dataclass(frozen=True)
class Conditions:
    """Everything that the U-Net sees besides latents and timesteps; it stays the same over the denoising steps.

    Attributes:
        conditioning: poses, keys and values of image and text, for the rows of all passes.
        passes: 2 when the unconditional pass runs too; its rows come first.
        normal_latents: [B*V,4,h,w], or None.
        reference_latents: the portraits' latents [passes*B,4,h,w], one more frame for the U-Net, or None.
    """

    conditioning: Conditioning
    passes: int = 1
    normal_latents: Tensor | None = None
    reference_latents: Tensor | None = None


@dataclass(frozen=True)
class Run:
    """One call of the pipeline, as `MultiViewDiffusionPipeline.prepare` makes it.

    Attributes:
        latents: where denoising starts, [B*V,4,h,w] float32: noise, or noised renders.
        timesteps: of the scheduler, falling.
        conditions: everything else that the U-Net sees.
        cameras: V of them.
        guidance_scale: 1.0 to 20.0.
        seed: of all noise.
        eta: 0 is deterministic, 1 as noisy as DDPM.
        upsample: "auto", "bilinear" or "none".
        output_type: "pil", "np", "pt" or "latent".
        is_batch: whether the call got a list of portraits, so that it returns a list.
        settings: everything else for the record of the run.
    """

    latents: Tensor
    timesteps: Tensor
    conditions: Conditions
    cameras: Cameras
    guidance_scale: float
    seed: int
    eta: float = 0.0
    upsample: str = "auto"
    output_type: str = "pil"
    is_batch: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def num_views(self) -> int:
        return len(self.cameras)

    @property
    def num_portraits(self) -> int:
        return len(self.latents) // self.num_views


def predict(unet: MultiViewUNet, scheduler: Scheduler, run: Run, latents: Tensor, timestep: float) -> Tensor:
    """Return the guided prediction [B*V,4,h,w] float32 for latents of that shape, both passes in one batch."""
    sample, conditions, frames = scheduler.scale_model_input(latents, timestep), run.conditions, run.num_views
    if conditions.normal_latents is not None:
        sample = torch.cat([sample, conditions.normal_latents], dim=1)
    if conditions.reference_latents is not None:
        frames += 1  # the U-Net itself puts the reference there, so any latents do
        sample = sample.unflatten(0, (-1, run.num_views))
        sample = torch.cat([sample, sample[:, :1]], dim=1).flatten(0, 1)
    output = unet(
        sample.to(unet.dtype).repeat(conditions.passes, 1, 1, 1),
        timestep,
        conditioning=conditions.conditioning,
        num_views=frames,
        reference_latents=conditions.reference_latents,
    ).float()
    if frames > run.num_views:
        output = output.unflatten(0, (-1, frames))[:, : run.num_views].flatten(0, 1)
    return guide(*output.chunk(2), run.guidance_scale) if conditions.passes == 2 else output


@dataclass(frozen=True)
class ImageTokens:
    """Image tokens of the portraits, for the U-Net's attention."""

    conditional: Tensor  # [B,T,C]
    unconditional: Tensor | None  # [B,T,C], or None when the unconditional pass attends to no image at all


def image_tokens(
    unet: MultiViewUNet, encoder: CLIPVisionEncoder, portraits: Sequence[PIL.Image.Image], *, guided: bool
) -> ImageTokens:
    """Encode portraits, and what guidance moves away from, as the U-Net's configuration has it.

    Args:
        unet: with image attention.
        encoder: CLIP.
        portraits: B pictures.
        guided: whether the unconditional tokens are needed.
    """
    pixels = torch.cat([encoder.preprocess(portrait) for portrait in portraits]).to(encoder.device, encoder.dtype)
    projection = unet.image_projection
    output = projection.clip_output if projection is not None else "last_hidden_state"
    project = projection if projection is not None else torch.nn.Identity()
    features = getattr(encoder(pixels), output)
    unconditional = None
    if guided and unet.config.image_unconditional == "zero_features":
        unconditional = project(torch.zeros_like(features))
    elif guided and unet.config.image_unconditional == "zero_image":
        unconditional = project(getattr(encoder(torch.zeros_like(pixels[:1])), output)).expand(len(pixels), -1, -1)
    return ImageTokens(project(features), unconditional)


def prepare_conditions(
    unet: MultiViewUNet,
    cameras: Cameras,
    *,
    portraits: int,
    tokens: ImageTokens | None,
    guided: bool,
    prompt_embeds: Tensor | None = None,
    normal_latents: Tensor | None = None,
    reference_latents: Tensor | None = None,
) -> Conditions:
    """Compute everything that stays the same over the denoising steps.

    Args:
        unet: the denoiser.
        cameras: V of them.
        portraits: B.
        tokens: of the portraits; None for a U-Net that does not look at them.
        guided: whether guidance wants the unconditional pass.
        prompt_embeds: [1,T,C], the same text for all rows; None is the all-zero text.
        normal_latents: [V,4,h,w], the same for every portrait, or None.
        reference_latents: [B,4,h,w], or None.
    """
    # Only the image sets the two passes apart: without it they are equal, and guidance changes nothing.
    guided = guided and tokens is not None
    passes, family = 2 if guided else 1, family_of(unet.config)
    pose = None
    if unet.config.pose_dim is not None:
        pose = family.poses(unet.config, cameras).repeat(passes * portraits, 1).to(unet.device)
    embeds = None if tokens is None else tokens.conditional
    if guided and tokens.unconditional is not None:
        embeds = torch.cat([tokens.unconditional, tokens.conditional])
    if guided and reference_latents is not None:
        reference_latents = torch.cat([family.unconditional_reference(reference_latents), reference_latents])
    return Conditions(
        unet.precompute(
            pose=pose,
            image_embeds=embeds,
            encoder_hidden_states=None if prompt_embeds is None else prompt_embeds.to(unet.device, unet.dtype),
        ),
        passes=passes,
        normal_latents=None if normal_latents is None else normal_latents.repeat(portraits, 1, 1, 1),
        reference_latents=None if reference_latents is None else reference_latents.to(unet.dtype),
    )
