"""How many portraits are denoised together, or at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gafext.conditions import latent_size, resolve_cameras
from gafext.families import family_of
from gafext.guidance import needs_unconditional

MOST = 16
SHARE = 0.7
"""Of the memory that a batch may need; the rest is for the ones before and after it, encoded and decoded meanwhile."""


LOOPS = 8
"""Portraits that are denoised at once on a CPU, at most: more loops would wait for Python's lock."""
SMALL = 100_000_000
"""Numbers of a U-Net, up to which several passes with few threads each take less time than one after the other with
all: 1/1.4 on two cores of a Zen 4 EPYC with the built-in model (3.4 million). In one of Stable Diffusion's size
(860 million) an operation is long enough to be divided."""


def check_batch_size(batch_size: Any, *, name: str = "batch_size") -> None:
    """Raise a ValueError unless the batch size is "auto" or a whole number above 0."""
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size >= 1
    if not whole and batch_size != "auto":
        raise ValueError(f'{name}: expected "auto" or a whole number above 0, got {batch_size!r}')


def automatic_batch_size(pipeline: Any, cameras: Any, options: Mapping[str, Any]) -> int:
    """Return the largest power of two, up to `MOST`, of portraits that the estimate of memory lets into `SHARE` of it.

    On CPUs that is 1, because more saves no time there, and where the free memory is not known.

    Args:
        pipeline: the pipeline.
        cameras, options: those of `prepare`.
    """
    return 1 if pipeline.device.type == "cpu" else _fitting(pipeline, cameras, options, most=MOST)


def loops_at_once(pipeline: Any, cameras: Any, options: Mapping[str, Any]) -> int:
    """Return how many portraits are denoised at once, each by a loop of its own with its share of PyTorch's threads.

    That is 1 but for a small U-Net on a CPU. Its operations are too short to be divided among threads; up to `LOOPS`
    portraits, and as many as the estimate of memory lets in, are not. What a thread does not inherit keeps it at 1 too:
    autocast, offloading, and networks that `torch.compile` has still to compile.

    Args:
        pipeline: the pipeline.
        cameras, options: those of `prepare`.
    """
    if pipeline.device.type != "cpu" or pipeline._offload is not None or torch.is_autocast_enabled("cpu"):
        return 1
    modules = list(pipeline.unet.modules())
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules)
    if compiled or sum(tensor.numel() for tensor in pipeline.unet.state_dict().values()) > SMALL:
        return 1
    return _fitting(pipeline, cameras, options, most=min(LOOPS, torch.get_num_threads()))


def _fitting(pipeline: Any, cameras: Any, options: Mapping[str, Any], *, most: int) -> int:
    """Halve `most` until the estimate of memory lets as many portraits into `SHARE` of it."""
    available = pipeline.available_bytes()
    if available is None:
        return 1
    family, config = family_of(pipeline.unet.config), pipeline.unet.config
    scale, upsample = options.get("guidance_scale"), options.get("upsample", "auto")
    learned = pipeline.upsampler is not None or family.doubles_latents
    work = {
        "views": len(resolve_cameras(cameras, options.get("num_views"), family)),
        "passes": 1 + needs_unconditional(pipeline.guidance_scale if scale is None else scale),
        "size": latent_size(None, rows=0, channels=0, config=config),
        "doubled": upsample == "bilinear" or (upsample == "auto" and learned),
    }
    while most > 1 and pipeline.estimate_bytes(portraits=most, **work) > SHARE * available:
        most //= 2
    return most
