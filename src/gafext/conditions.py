"""What the U-Net is told in a run besides latents and timesteps, for both families, and how one step asks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor

from gafext.cameras import Cameras
from gafext.config import UNetConfig
from gafext.guidance import guide
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import Conditioning, MultiViewUNet
from gafext.scheduler import Scheduler


@dataclass(frozen=True)
class Conditions:
    """Everything that stays the same over the denoising steps of a run.

    Attributes:
        conditioning: poses, keys and values of image and text, for the rows of all passes.
        passes: 2 when the unconditional pass runs too; its rows come first.
        normal_latents: [B*V,4,h,w], or None.
        reference_latents: the portraits' latents [passes*B,4,h,w], a frame more for the U-Net, or None.
    """

    conditioning: Conditioning
    passes: int = 1
    normal_latents: Tensor | None = None
    reference_latents: Tensor | None = None

    def predict(
        self,
        unet: MultiViewUNet,
        scheduler: Scheduler,
        latents: Tensor,
        timestep: float,
        *,
        num_views: int,
        guidance_scale: float,
    ) -> Tensor:
        """The guided prediction [B*V,4,h,w] float32 for latents of that shape, both passes in one batch."""
        sample = scheduler.scale_model_input(latents, timestep)
        if self.normal_latents is not None:
            sample = torch.cat([sample, self.normal_latents], dim=1)
        frames = num_views
        if self.reference_latents is not None:
            frames += 1  # the U-Net itself puts the reference there, so any latents do
            sample = sample.unflatten(0, (-1, num_views))
            sample = torch.cat([sample, sample[:, :1]], dim=1).flatten(0, 1)
        output = unet(
            sample.to(unet.dtype).repeat(self.passes, 1, 1, 1),
            timestep,
            conditioning=self.conditioning,
            num_views=frames,
            reference_latents=self.reference_latents,
        ).float()
        if frames > num_views:
            output = output.unflatten(0, (-1, frames))[:, :num_views].flatten(0, 1)
        return guide(*output.chunk(2), guidance_scale) if self.passes == 2 else output


def uses_reference(config: UNetConfig) -> bool:
    """Whether the portrait's latents are a frame of their own: ImageDream's family."""
    return config.cross_view == "dense" and config.image_attention is not None


def pose_rows(config: UNetConfig, cameras: Cameras, *, portraits: int) -> Tensor | None:
    """The cameras as the U-Net was trained to see them: [B*frames,pose_dim], or None when it sees none.

    GAF's family reads world-to-camera matrices. ImageDream's and MVDream's reads camera-to-world ones with Blender's
    axes at distance 1, and zeros for the reference.
    """
    if config.pose_dim is None:
        return None
    if config.cross_view != "dense":
        return cameras.pose(config.pose_dim).repeat(portraits, 1)
    poses = cameras.blender_pose(config.pose_dim)
    if uses_reference(config):
        poses = torch.cat([poses, torch.zeros_like(poses[:1])])
    return poses.repeat(portraits, 1)


@dataclass(frozen=True)
class ImageTokens:
    """What the portraits become in the U-Net's attention."""

    conditional: Tensor  # [B,T,C]
    unconditional: Tensor | None  # [B,T,C], or None when the unconditional pass attends to no image at all


def image_tokens(
    unet: MultiViewUNet, encoder: CLIPVisionEncoder, portraits: Sequence[PIL.Image.Image], *, guided: bool
) -> ImageTokens:
    """Encode portraits, and what guidance moves away from, as the checkpoint's family has it.

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


def prepare(
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
    """Bring together what the U-Net is told.

    Args:
        unet: the denoiser.
        cameras: V of them.
        portraits: B.
        tokens: of the portraits; None for a U-Net that does not look at them.
        guided: whether guidance wants the unconditional pass.
        prompt_embeds: [1,T,C], the same text for all rows; None is the all-zero text.
        normal_latents: [B*V,4,h,w], or None.
        reference_latents: [B,4,h,w], or None.
    """
    # Only the image tells the two passes apart: without it they are equal, and guidance changes nothing.
    guided = guided and tokens is not None
    pose = pose_rows(unet.config, cameras, portraits=portraits)
    embeds = None if tokens is None else tokens.conditional
    if guided:
        pose = None if pose is None else pose.repeat(2, 1)
        if tokens.unconditional is not None:
            embeds = torch.cat([tokens.unconditional, tokens.conditional])
        if reference_latents is not None:
            reference_latents = torch.cat([torch.zeros_like(reference_latents), reference_latents])
    return Conditions(
        unet.precompute(
            pose=None if pose is None else pose.to(unet.device),
            image_embeds=embeds,
            encoder_hidden_states=None if prompt_embeds is None else prompt_embeds.to(unet.device, unet.dtype),
        ),
        passes=2 if guided else 1,
        normal_latents=normal_latents,
        reference_latents=None if reference_latents is None else reference_latents.to(unet.dtype),
    )
