"""The portraits of a call: read, and cropped to the head."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import numpy as np
import PIL.Image
import torch

from gafext import images as imaging
from gafext.models.head_detector import HeadBox, HeadDetector

LOOKED_AT = 512
"""Longest side, in pixels, of what the head is looked for in: in float32 a phone's photograph takes 576 MB."""
WELL_CENTRED, WELL_SIZED = 0.12, 1.25
"""Distance of a head from the centre, of the portrait's side, and factor of its size, at which it is not cropped."""


def load_portraits(
    image: Any, copies: int, *, background: imaging.Colour, matte: bool, detector: HeadDetector | None = None
) -> tuple[bool, list[PIL.Image.Image]]:
    """Load the portraits of a call, with a warning for each that is cropped or whose background is not plain.

    Args:
        image: a portrait, or a list or stack of portraits.
        copies: how often to return each: the call's num_images_per_prompt.
        background, matte: those of `load_image`.
        detector: finds the head that a portrait is cropped to; None: portraits are not cropped.

    Returns:
        Whether the call returns a list, and the portraits.

    Raises:
        ImageError: a portrait cannot be read.
        ValueError: there are no portraits, or `copies` is not a whole number above 0.
    """
    if isinstance(copies, bool) or not hasattr(copies, "__index__") or operator.index(copies) < 1:
        raise ValueError(f"num_images_per_prompt: expected a whole number above 0, got {copies!r}")
    several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
    items: Any = image if several else [image]
    portraits = []
    for index, item in enumerate(items):
        name = (getattr(item, "filename", "") or f"image[{index}]") if several else "image"
        read = imaging.read_image(item, name=name)
        portrait = imaging.flatten(read, background=background, matte=matte)
        if detector is not None:
            portrait = _crop_to_head(portrait, detector, name)
        if not matte and read.mode == "RGB" and imaging.background_spread(portrait) > imaging.MAX_BACKGROUND_SPREAD:
            warnings.warn(
                f"{name}: the background is not plain, and may appear in the views: remove it with matte=True "
                "(--matte), or pass a cut-out with transparency",
                stacklevel=4,
            )
        portraits += [portrait] * operator.index(copies)
    if not portraits:
        raise ValueError("image: expected at least one portrait, got an empty list")
    return several or copies > 1, portraits


def _crop_to_head(portrait: PIL.Image.Image, detector: HeadDetector, name: str) -> PIL.Image.Image:
    """Crop a portrait to its head unless its centre square frames it well, or no head is found."""
    small = portrait.copy()
    small.thumbnail((LOOKED_AT, LOOKED_AT))
    found = detector.find(torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255)
    whole = min(portrait.size)
    if found is None:
        warnings.warn(f"{name}: no head is found, and the centre square is taken", stacklevel=5)
        return portrait
    box = HeadBox(*(length * max(portrait.size) / max(small.size) for length in found))
    away = max(abs(box.x - portrait.width / 2), abs(box.y - portrait.height / 2)) / whole
    if away < WELL_CENTRED and 1 / WELL_SIZED < box.side / whole < WELL_SIZED:
        return portrait
    warnings.warn(
        f"{name}: cropped to the head, a square of {box.side:.0f} pixels around ({box.x:.0f}, {box.y:.0f}); crop=False "
        "(--no-crop) takes the centre square",
        stacklevel=5,
    )
    return imaging.crop_square(portrait, x=box.x, y=box.y, side=box.side)
