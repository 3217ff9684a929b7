"""How many portraits are denoised together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gafext.conditions import latent_size, resolve_cameras
from gafext.families import family_of
from gafext.guidance import needs_unconditional

MOST = 16
SHARE = 0.7
"""Of the memory that a batch may need; the rest is for the ones before and after it, encoded and decoded meanwhile."""


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
    available = None if pipeline.device.type == "cpu" else pipeline.available_bytes()
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
    batch_size = MOST
    while batch_size > 1 and pipeline.estimate_bytes(portraits=batch_size, **work) > SHARE * available:
        batch_size //= 2
    return batch_size
