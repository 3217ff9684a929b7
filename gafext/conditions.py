"""State of a run between `prepare` and `finish`: the U-Net's conditioning, and the prediction of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import PIL.Image
import torch
from torch import Tensor

from gafext.cameras import Cameras
from gafext.families import family_of
from gafext.guidance import guide
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import Conditioning, MultiViewUNet
from gafext.schedulers import Scheduler


class RunOptions(TypedDict, total=False):
    """The options of `MultiViewDiffusionPipeline.prepare`, which documents them, for what hands them on."""

    num_views: int
    num_inference_steps: int
    guidance_scale: float | None
    generator: torch.Generator | int | None
    latents: Tensor | None
    renders: Any
    strength: float
    eta: float
    upsample: str
    output_type: str


@dataclass(frozen=True)
class Conditions:
    """Inputs of the U-Net besides latents and timesteps, constant over the denoising steps.

    Attributes:
        conditioning: pose embedding, and keys and values of image and text, for the rows of all passes.
        passes: 2 with the unconditional pass, whose rows come first, else 1.
        normal_latents: latents of the normal maps [B*V,4,h,w], or None.
        reference_latents: latents of the portraits [passes*B,4,h,w], an extra frame of the U-Net, or None.
    """

    conditioning: Conditioning
    passes: int = 1
    normal_latents: Tensor | None = None
    reference_latents: Tensor | None = None


@dataclass(frozen=True)
class Run:
    """One call of the pipeline, as `MultiViewDiffusionPipeline.prepare` returns it.

    Attributes:
        latents: initial latents [B*V,4,h,w] float32: noise, or noised renders.
        timesteps: the scheduler's timesteps, decreasing; the last ones of a run from renders.
        num_inference_steps: of the whole schedule.
        conditions: the U-Net's other inputs.
        cameras: V cameras.
        guidance_scale: 1.0 to 20.0.
        seed: seed of all noise.
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
        upsample: "auto", "bilinear" or "none".
        output_type: "pil", "np", "pt" or "latent".
        is_batch: True if the call got a list of portraits; it then returns a list.
        settings: other parameters for run.json.
    """

    latents: Tensor
    timesteps: Tensor
    num_inference_steps: int
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
    """Predict the U-Net's output [B*V,4,h,w] float32 for latents of that shape, guided; both passes form one batch."""
    sample, conditions, frames = scheduler.scale_model_input(latents, timestep), run.conditions, run.num_views
    if conditions.normal_latents is not None:
        sample = torch.cat([sample, conditions.normal_latents], dim=1)
    if conditions.reference_latents is not None:
        frames += 1  # the U-Net overwrites this frame with the reference latents, so its content is irrelevant
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
    predictions = output.chunk(conditions.passes)
    return guide(predictions[0], predictions[1], run.guidance_scale) if conditions.passes == 2 else output


@dataclass(frozen=True)
class ImageTokens:
    """Image tokens of the portraits, for the U-Net's attention."""

    conditional: Tensor  # [B,T,C]
    unconditional: Tensor | None  # [B,T,C]; None: the unconditional pass attends to no image


def image_tokens(
    unet: MultiViewUNet, encoder: CLIPVisionEncoder, portraits: Sequence[PIL.Image.Image], *, guided: bool
) -> ImageTokens:
    """Encode portraits to image tokens, and the unconditional tokens that the U-Net's configuration asks for.

    Args:
        unet: a U-Net with image attention.
        encoder: the CLIP image encoder.
        portraits: B images.
        guided: also compute the unconditional tokens.

    Returns:
        Tokens [B,T,C], conditional and unconditional.
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
    """Compute the U-Net's inputs that are constant over the denoising steps.

    Args:
        unet: the denoiser.
        cameras: V cameras.
        portraits: number of portraits, B.
        tokens: image tokens of the portraits; None for a U-Net without image attention.
        guided: include the unconditional pass; ignored without tokens.
        prompt_embeds: text embeddings [1,T,C] for all rows; None: zeros.
        normal_latents: latents of the normal maps [V,4,h,w] for every portrait, or None.
        reference_latents: latents of the portraits [B,4,h,w], or None.

    Returns:
        The conditions for all B*V rows of each pass.
    """
    # The passes differ only in the image: without image tokens they are equal, and guidance has no effect.
    guided = guided and tokens is not None
    passes, family = 2 if guided else 1, family_of(unet.config)
    pose = None
    if unet.config.pose_dim is not None:
        pose = family.poses(unet.config, cameras).repeat(passes * portraits, 1).to(unet.device)
    embeds = None if tokens is None else tokens.conditional
    if guided and tokens is not None and tokens.unconditional is not None:
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
