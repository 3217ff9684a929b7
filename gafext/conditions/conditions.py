"""The U-Net's inputs besides latents and timesteps, which are constant over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import PIL.Image
import torch
from torch import Tensor

from gafext.cameras import Cameras
from gafext.families import family_of
from gafext.models.attention import KeyValue
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.image_normalizer import ImageNormalizer
from gafext.models.unet import Conditioning, MultiViewUNet
from gafext.noise import view_noise
from gafext.schedulers import Scheduler

LABEL_STEP = 2**20 + 1
"""Argument `step` of `view_noise` for the noise of class labels; the upsampler's is one less."""


@dataclass(frozen=True)
class Conditions:
    """Inputs of the U-Net besides latents and timesteps, constant over the denoising steps.

    Attributes:
        conditioning: class embedding, and keys and values of image and text, for the rows of all passes.
        passes: 2 with the unconditional pass, whose rows come first, else 1.
        input_latents: [passes*B*V,4,h,w], the U-Net's channels after the noisy latents: latents of the normal maps or
            of the portraits; or None.
        reference_latents: latents of the portraits [passes*B,4,h,w], an extra frame of the U-Net, or None.
    """

    conditioning: Conditioning
    passes: int = 1
    input_latents: Tensor | None = None
    reference_latents: Tensor | None = None

    def unconditional(self, portraits: int) -> Conditions:
        """Return the inputs of the unconditional pass alone, which share the memory of these; `portraits` is B."""
        assert self.passes == 2
        given = self.conditioning
        # The image has B rows where this pass sees none; to the reference it attends as to zeros.
        images = tuple(KeyValue(*(x[:portraits] for x in e)) for e in given.image_key_values if len(e.key) > portraits)
        added = given.image_time_embeds
        added = None if added is None or len(added) == portraits else added[:portraits]
        references = tuple(KeyValue(*(x[:0] for x in each)) for each in given.reference_key_values)
        # All of a text that is one row for both passes.
        return self._pass(lambda rows: rows[: (len(rows) + 1) // 2], images, added, references)

    def conditional(self, portraits: int) -> Conditions:
        """Return the inputs of the conditional pass alone, which share the memory of these; `portraits` is B."""
        if self.passes == 1:
            return self
        given = self.conditioning
        # Of 2 B rows, or of B where the unconditional pass has no image; those of the reference are always B.
        images = tuple(KeyValue(*(x[-portraits:] for x in each)) for each in given.image_key_values)
        added = None if given.image_time_embeds is None else given.image_time_embeds[-portraits:]
        return self._pass(lambda rows: rows[len(rows) // 2 :], images, added, given.reference_key_values)

    def _pass(
        self,
        half: Callable[[Tensor], Tensor],
        image_key_values: tuple[KeyValue, ...],
        image_time_embeds: Tensor | None,
        reference_key_values: tuple[KeyValue, ...],
    ) -> Conditions:
        """Return the inputs of one of two passes: `half` of what has a row for each."""
        given, inputs, reference = self.conditioning, self.input_latents, self.reference_latents
        conditioning = replace(
            given,
            pose_embeds=None if given.pose_embeds is None else half(given.pose_embeds),
            image_key_values=image_key_values,
            image_time_embeds=image_time_embeds,
            text_key_values=tuple(KeyValue(*map(half, each)) for each in given.text_key_values),
            reference_key_values=reference_key_values,
        )
        return Conditions(
            conditioning,
            input_latents=None if inputs is None else half(inputs),
            reference_latents=None if reference is None else half(reference),
        )


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


def portrait_labels(
    encoder: CLIPVisionEncoder,
    normalizer: ImageNormalizer,
    scheduler: Scheduler,
    portraits: Sequence[PIL.Image.Image],
    *,
    views: int,
    seed: int | tuple[int, ...],
) -> Tensor:
    """Compute class labels of portraits; those of the V views of a portrait differ in their noise alone.

    Args:
        encoder: the CLIP image encoder, with projection.
        normalizer: statistics of its embeddings.
        scheduler: noise schedule of its embeddings.
        portraits: B images.
        views: V.
        seed: seed of the noise, or one per portrait.

    Returns:
        [B*V,2D] float32, the view index fastest.
    """
    pixels = torch.cat([encoder.preprocess(portrait) for portrait in portraits]).to(encoder.device, encoder.dtype)
    embeds = encoder(pixels).image_embeds.repeat_interleave(views, dim=0)
    noise = view_noise(seed, portraits=len(portraits), views=views, shape=embeds.shape[1:], step=LABEL_STEP)
    return normalizer(embeds, noise.to(embeds.device), scheduler.alphas_cumprod)


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
    labels: Tensor | None = None,
) -> Conditions:
    """Compute the U-Net's inputs that are constant over the denoising steps.

    Args:
        unet: the denoiser.
        cameras: V cameras.
        portraits: number of portraits, B.
        tokens: image tokens of the portraits; None for a U-Net without image attention.
        guided: include the unconditional pass; ignored for a U-Net that is given nothing of the portrait.
        prompt_embeds: text embeddings [1,T,C] for all rows, or [V,T,C]; for a family with a negative prompt [2,T,C],
            that of the unconditional pass first; None: zeros.
        normal_latents: latents of the normal maps, [V,4,h,w] for every portrait or [B*V,4,h,w]; or None.
        reference_latents: latents of the portraits [B,4,h,w], or None.
        labels: class labels of the portraits [B*V,pose_dim], instead of the cameras; or None.

    Returns:
        The conditions for all B*V rows of each pass.
    """
    # The passes differ only in the image: where the U-Net sees none they are equal, and guidance has no effect.
    family = family_of(unet.config)
    sees_latents = family.reference_channels or family.attends_to_latents
    guided = guided and (tokens is not None or labels is not None or sees_latents)
    passes, views, rays = 2 if guided else 1, len(cameras), family.rays(unet.config, cameras)
    pose = None
    if labels is not None:
        pose = torch.cat([torch.zeros_like(labels), labels]) if guided else labels
    elif unet.config.pose_dim is not None:
        pose = family.poses(unet.config, cameras).repeat(passes * portraits, 1).to(unet.device)
    embeds = None if tokens is None else tokens.conditional
    if guided and tokens is not None and tokens.unconditional is not None:
        embeds = torch.cat([tokens.unconditional, tokens.conditional])
    attended = None  # fewer rows than both passes have: the unconditional pass attends to zeros
    if family.attends_to_latents:
        attended, reference_latents = reference_latents, None
    if guided and reference_latents is not None:
        reference_latents = torch.cat([family.unconditional_reference(reference_latents), reference_latents])
    input_latents = None
    if normal_latents is not None:
        input_latents = normal_latents.repeat(passes * portraits * views // len(normal_latents), 1, 1, 1)
    if family.reference_channels and reference_latents is not None:
        input_latents, reference_latents = reference_latents.repeat_interleave(views, dim=0), None
    if prompt_embeds is not None and family.negative_prompt is not None:
        prompt_embeds = prompt_embeds[-passes:]  # without guidance, the negative prompt is not used
    elif prompt_embeds is not None and len(prompt_embeds) > 1:
        prompt_embeds = prompt_embeds.repeat(passes * portraits, 1, 1)
    return Conditions(
        unet.precompute(
            pose=pose,
            image_embeds=embeds,
            encoder_hidden_states=None if prompt_embeds is None else prompt_embeds.to(unet.device, unet.dtype),
            reference_latents=attended,
            rays=None if rays is None else rays.to(unet.device),
        ),
        passes=passes,
        input_latents=input_latents,
        reference_latents=None if reference_latents is None else reference_latents.to(unet.dtype),
    )
