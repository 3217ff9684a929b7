"""State of a run between `prepare` and `finish`: the U-Net's conditioning, and the prediction of one step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import PIL.Image
import torch
from torch import Tensor

from gafext.cameras import Cameras, as_cameras
from gafext.config import UNetConfig
from gafext.families import Family, family_of
from gafext.heads import Heads
from gafext.mesh import Mesh
from gafext.models.attention import KeyValue
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.image_normalizer import ImageNormalizer
from gafext.models.unet import Conditioning, MultiViewUNet
from gafext.noise import view_noise
from gafext.schedulers import Scheduler

DEFAULT_SAMPLE_SIZE = 32
DEFAULT_VIEWS = 4
LABEL_STEP = 2**20 + 1
"""Argument `step` of `view_noise` for the noise of class labels; the upsampler's is one less."""


class RunOptions(TypedDict, total=False):
    """The options of `MultiViewDiffusionPipeline.prepare`, which documents them, for what hands them on."""

    num_views: int | None
    preset: str | None
    num_inference_steps: int | None
    scheduler: str | None
    graph: bool
    parallel: str | None
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    generator: torch.Generator | int | Sequence[torch.Generator | int] | None
    num_images_per_prompt: int
    latents: Tensor | None
    renders: Any
    strength: float
    eta: float | None
    upsample: str
    upsample_steps: int | None
    output_type: str
    matte: bool
    crop: bool
    fit: bool


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
        references = tuple(KeyValue(*(x[:0] for x in each)) for each in given.reference_key_values)
        # All of a text that is one row for both passes.
        return self._pass(lambda rows: rows[: (len(rows) + 1) // 2], images, references)

    def conditional(self, portraits: int) -> Conditions:
        """Return the inputs of the conditional pass alone, which share the memory of these; `portraits` is B."""
        if self.passes == 1:
            return self
        given = self.conditioning
        # Of 2 B rows, or of B where the unconditional pass has no image; those of the reference are always B.
        images = tuple(KeyValue(*(x[-portraits:] for x in each)) for each in given.image_key_values)
        return self._pass(lambda rows: rows[len(rows) // 2 :], images, given.reference_key_values)

    def _pass(
        self,
        half: Callable[[Tensor], Tensor],
        image_key_values: tuple[KeyValue, ...],
        reference_key_values: tuple[KeyValue, ...],
    ) -> Conditions:
        """Return the inputs of one of two passes: `half` of what has a row for each."""
        given, inputs, reference = self.conditioning, self.input_latents, self.reference_latents
        conditioning = replace(
            given,
            pose_embeds=None if given.pose_embeds is None else half(given.pose_embeds),
            image_key_values=image_key_values,
            text_key_values=tuple(KeyValue(*map(half, each)) for each in given.text_key_values),
            reference_key_values=reference_key_values,
        )
        return Conditions(
            conditioning,
            input_latents=None if inputs is None else half(inputs),
            reference_latents=None if reference is None else half(reference),
        )


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
        solver: the scheduler, or one of the run's own.
        seed: seed of all noise, or one per portrait.
        portraits: B portraits, RGB of any size.
        guidance_interval: noise levels (a, b) of the steps with guidance, a < σ ≤ b; None: all steps.
        graph: launch the U-Net and the upsampler's network as CUDA graphs.
        parallel: "guidance": this process computes one pass of a guided step, and another the other one; or None.
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
        upsample: "auto", "bilinear" or "none".
        upsample_steps: of the checkpoint's upsampler.
        output_type: "pil", "np", "pt" or "latent".
        is_batch: True if the call got a list of portraits or asked for several results each; it then returns a list.
        num_images_per_prompt: results per portrait; each counts as a portrait everywhere else.
        normal_maps: V pictures of the normal maps, or V for each of `heads`; None for a U-Net without them.
        mesh: the mesh that the normal maps are of, or None.
        heads: the heads that are fitted to the portraits and that the normal maps are of, or None; one for the
            `num_images_per_prompt` results of a portrait.
        settings: other parameters for run.json.
    """

    latents: Tensor
    timesteps: Tensor
    num_inference_steps: int
    conditions: Conditions
    cameras: Cameras
    guidance_scale: float
    solver: Scheduler
    seed: int | tuple[int, ...]
    portraits: Sequence[PIL.Image.Image]
    guidance_interval: tuple[float, float] | None = None
    graph: bool = False
    parallel: str | None = None
    eta: float = 0.0
    upsample: str = "auto"
    upsample_steps: int = 10
    output_type: str = "pil"
    is_batch: bool = False
    num_images_per_prompt: int = 1
    normal_maps: list[PIL.Image.Image] | None = None
    mesh: Mesh | None = None
    heads: Sequence[Heads] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def num_views(self) -> int:
        return len(self.cameras)

    @property
    def num_portraits(self) -> int:
        return len(self.latents) // self.num_views

    def begun(self) -> Run:
        """Return the run with a solver of its own at its first timestep: two runs may take steps in turns."""
        solver = self.solver.for_run()
        solver.set_timesteps(self.num_inference_steps)  # another run may have been prepared meanwhile
        solver.set_begin_index(len(solver.timesteps) - len(self.timesteps))
        return replace(self, solver=solver)

    def normal_maps_of(self, index: int) -> list[PIL.Image.Image] | None:
        """Return the V pictures of the normal maps of the result with this index."""
        if self.normal_maps is None or self.heads is None:
            return self.normal_maps
        first = index // self.num_images_per_prompt * self.num_views
        return self.normal_maps[first : first + self.num_views]

    def surface_of(self, index: int) -> Mesh | Heads | None:
        """Return what the normal maps of the result with this index are of; None: the neutral head, or pictures."""
        return self.mesh if self.heads is None else self.heads[index // self.num_images_per_prompt]

    def describe(self, index: int) -> dict[str, Any]:
        """Return the parameters of the result with this index, for run.json."""
        return {
            "num_views": self.num_views,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": self.guidance_interval,
            "seed": self.seed[index] if isinstance(self.seed, tuple) else self.seed,
            "eta": self.eta,
            "output_type": self.output_type,
            **self.settings,
            "portrait_index": index // self.num_images_per_prompt,
            "image_index": index % self.num_images_per_prompt,
        }


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


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise a ValueError unless a value is one of those known."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")


def resolve_cameras(cameras: Any, num_views: int | None, family: Family) -> Cameras:
    """Return the cameras of a call: those given, the family's default, or an orbit.

    The number of cameras must agree with num_views, unless that is None or 4.
    """
    if isinstance(cameras, (str, os.PathLike)):
        raise ValueError(f"cameras: expected Cameras or matrices, got a path; pass read_transforms({str(cameras)!r})")
    default = family.default_cameras()
    if family.fixed_cameras and default is not None:
        others = cameras is not None and not _see_alike(as_cameras(cameras, num_views=len(default)), default)
        if others or num_views not in (None, DEFAULT_VIEWS, len(default)):
            got = "other cameras" if others else f"num_views={num_views}"
            raise ValueError(f"{got}: expected neither, because this checkpoint makes its {len(default)} views alone")
        return default
    orbit = as_cameras(None, num_views=DEFAULT_VIEWS if num_views is None else num_views)
    if cameras is None:
        return default if default is not None and num_views in (None, len(default)) else orbit
    cameras = as_cameras(cameras, num_views=len(orbit))
    if num_views not in (None, DEFAULT_VIEWS, len(cameras)):
        raise ValueError(f"num_views: expected {len(cameras)}, the number of cameras, got {num_views}")
    return cameras


def _see_alike(left: Cameras, right: Cameras) -> bool:
    pairs = ((left.w2c, right.w2c), (left.intrinsics(1), right.intrinsics(1)))
    return len(left) == len(right) and all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def latent_size(latents: Tensor | None, *, rows: int, channels: int, config: UNetConfig) -> int:
    """Return the side of the latents of a call, by default the U-Net's; latents have to be [rows,channels,s,s]."""
    if latents is None:
        size = config.sample_size or DEFAULT_SAMPLE_SIZE
        assert isinstance(size, int)  # UNetConfig refuses a size that is not square
        return size
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents: expected a tensor, got {type(latents).__name__}")
    shape = list(latents.shape)
    if len(shape) != 4 or shape[:2] != [rows, channels] or shape[2] != shape[3] or shape[2] == 0:
        raise ValueError(f"latents: expected [{rows},{channels},s,s], got {shape}")
    return shape[2]


def rows_together(views: int, numbers: int, *, most: int) -> int:
    """Return how many views, of so many numbers each, to compute together: of one portrait only, which they divide.

    So the result of a portrait does not depend on the others, and views that are large take no more memory than one.
    """
    rows = min(max(1, most // numbers), views)
    return next(n for n in range(rows, 0, -1) if views % n == 0)
