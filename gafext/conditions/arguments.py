"""Arguments of a call, and what they come to: its cameras and the size of its latents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from gafext.cameras import Cameras, as_cameras
from gafext.config import UNetConfig
from gafext.families import Family

DEFAULT_SAMPLE_SIZE = 32
DEFAULT_VIEWS = 4


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
