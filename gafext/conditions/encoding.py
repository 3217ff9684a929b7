"""From pictures to latents and back, and to the conditions of a run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from gafext import images as imaging
from gafext.cameras import Cameras
from gafext.checkpoints.components import PipelineComponents
from gafext.conditions.arguments import rows_together
from gafext.conditions.conditions import (
    Conditions,
    ImageTokens,
    image_tokens,
    portrait_labels,
    prepare_conditions,
)
from gafext.families import family_of
from gafext.heads import Heads, head_normals
from gafext.mesh import HEAD_HEIGHT, Mesh, unusual_coverage

_ENCODED = 2**20  # pixels times channels that are encoded together: 4 views of the built-in model, one of SD's


class PipelineEncoding(PipelineComponents):
    """The autoencoder and the image encoder of a pipeline at work."""

    @torch.no_grad()
    def encode(self, pictures: Tensor, *, together: int = 1) -> Tensor:
        """Encode images [N,3,H,W] in [0,1] to scaled latents [N,4,h,w] float32, the mean of the distribution.

        Args:
            pictures: the images.
            together: images that are encoded as one batch. By default one, so that no result depends on the others, and
                8 views take an eighth of the memory.
        """
        config = self.vae.config
        inputs = ((picture * 2 - 1).to(self.device, self.dtype) for picture in pictures.split(together))
        means = torch.cat([self.vae.encode(picture)[0] for picture in inputs]).float()
        return (means - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [N,4,h,w] to images [N,3,H,W] float32, about in [0,1], not clamped."""
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        parts = latents.split(1 if self.vae.use_slicing else max(len(latents), 1))
        return torch.cat([self.vae.decode(part.to(self.dtype)).float() / 2 + 0.5 for part in parts])

    def encode_portraits(self, portraits: Sequence[PIL.Image.Image], *, guided: bool = False) -> ImageTokens | None:
        """Encode portraits to image tokens; None for a U-Net without image attention.

        Args:
            portraits: B RGB images of any size.
            guided: also compute the tokens of the unconditional pass.
        """
        if self.unet.config.image_attention is None:
            return None
        assert self.image_encoder is not None  # _check_parts requires it with image attention
        return image_tokens(self.unet, self.image_encoder, portraits, guided=guided)

    @property
    def takes_normals(self) -> bool:
        """The U-Net has channels for the latents of normal maps."""
        extra = self.unet.config.in_channels != self.vae.config.latent_channels
        return extra and not family_of(self.unet.config).reference_channels

    def _conditions(
        self,
        cameras: Cameras,
        portraits: Sequence[PIL.Image.Image],
        normals: Tensor | None,
        *,
        pixels: int,
        guided: bool,
        seed: int | tuple[int, ...],
    ) -> Conditions:
        """Compute the U-Net's constant inputs.

        Args:
            cameras: V cameras.
            portraits: B RGB images of any size.
            normals: normal maps [V,3,s,s] of all portraits, or [N*V,3,s,s] of N heads, of which each has B/N portraits
                in a row; or None.
            pixels: side of the views before upsampling, s.
            guided: include the unconditional pass.
            seed: seed of the noise of class labels, or one per portrait.
        """
        views, normal_latents = len(cameras), None
        if normals is not None:
            numbers = pixels**2 * self.vae.config.block_out_channels[0]
            normal_latents = self.encode(normals, together=rows_together(views, numbers, most=_ENCODED))
            if len(normals) > views:
                of_heads = normal_latents.unflatten(0, (-1, views))
                normal_latents = of_heads.repeat_interleave(len(portraits) // len(of_heads), dim=0).flatten(0, 1)
        return prepare_conditions(
            self.unet,
            cameras,
            portraits=len(portraits),
            tokens=self.encode_portraits(portraits, guided=guided),
            guided=guided,
            prompt_embeds=self.prompt_embeds,
            normal_latents=normal_latents,
            reference_latents=self._reference(portraits, pixels),
            labels=self._portrait_labels(portraits, views=views, seed=seed),
        )

    def _fit(self, portraits: Sequence[PIL.Image.Image]) -> list[Heads] | None:
        """Fit a drawn head to each portrait; None: the checkpoint has no head_fitter, or no use for one."""
        if self.head_fitter is None or not self.takes_normals:
            return None
        return [self.head_fitter.fit(portrait) for portrait in portraits]

    def _normal_maps(
        self, normal_maps: Any, cameras: Cameras, pixels: int, fitted: Sequence[Heads] | None
    ) -> Tensor | None:
        """Load or render normal maps [V,3,s,s], of N fitted heads [N*V,3,s,s]; None: the U-Net does not take them."""
        if not self.takes_normals:
            if normal_maps is not None:
                raise ValueError("normal_maps: expected None, because this U-Net has no channels for normal latents")
            return None
        if normal_maps is None:
            normals = torch.cat([head_normals(cameras, pixels, head) for head in fitted or (None,)])
            if reason := next(filter(None, map(unusual_coverage, normals.split(len(cameras)))), ""):
                which = "neutral" if fitted is None else "fitted"
                warnings.warn(
                    f"normal_maps: {reason} by the {which} head, which is {HEAD_HEIGHT} units high: pass the mesh that "
                    "the cameras belong to (--mesh), or scale the cameras",
                    stacklevel=4,
                )
            return normals
        if isinstance(normal_maps, Mesh):
            return normal_maps.normal_maps(cameras, pixels)
        maps = imaging.load_images(normal_maps, count=len(cameras), name="normal_maps", background=imaging.GREY)
        return imaging.to_square_tensor(maps, pixels)

    def _reference(self, portraits: Sequence[PIL.Image.Image], pixels: int) -> Tensor | None:
        """Encode the portraits to latents [B,4,h,w]; None for a family whose U-Net does not take them."""
        family = family_of(self.unet.config)
        sees_latents = family.reference_channels or family.attends_to_latents
        if not (sees_latents or family.has_reference_frame(self.unet.config)):
            return None
        return self.encode(imaging.to_square_tensor(portraits, pixels))

    def _portrait_labels(
        self, portraits: Sequence[PIL.Image.Image], *, views: int, seed: int | tuple[int, ...]
    ) -> Tensor | None:
        """Compute class labels [B*V,pose_dim] of the portraits; None for a family whose labels are of the cameras."""
        if not family_of(self.unet.config).portrait_labels:
            return None
        encoder, normalizer, scheduler = self.image_encoder, self.image_normalizer, self.image_noising_scheduler
        assert encoder is not None and normalizer is not None and scheduler is not None  # _check_parts requires them
        return portrait_labels(encoder, normalizer, scheduler, portraits, views=views, seed=seed)
