"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

import math
import numbers

from torch import Tensor

MIN_SCALE = 1.0
MAX_SCALE = 20.0


def check_guidance_scale(scale: float, *, least: float = MIN_SCALE) -> None:
    """Raise a ValueError unless least ≤ scale ≤ 20.0."""
    number = isinstance(scale, numbers.Real) and math.isfinite(scale)
    if not (number and least <= scale <= MAX_SCALE):
        raise ValueError(f"guidance_scale: expected a number from {least} to {MAX_SCALE}, got {scale!r}")


def needs_unconditional(scale: float) -> bool:
    """Return True unless the scale is 1, at which the unconditional prediction cancels out."""
    return scale != 1.0


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Move a prediction away from the unconditional one: u + s (c - u).

    Args:
        unconditional: u, [B,C,h,w], any floating-point dtype.
        conditional: c, same shape and dtype.
        scale: s, 1.0 to 20.0; see `check_guidance_scale`.

    Returns:
        [B,C,h,w], same dtype.

    Raises:
        ValueError: the shapes differ.

    Source: arXiv 2207.12598 eq. 6, with s = 1 + w.
    """
    if unconditional.shape != conditional.shape:
        raise ValueError(
            f"conditional: expected the unconditional prediction's shape {list(unconditional.shape)}, "
            f"got {list(conditional.shape)}"
        )
    return unconditional + scale * (conditional - unconditional)
