"""Classifier-free guidance (arXiv 2207.12598), its noise levels (arXiv 2404.07724), and its passes on two processes."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
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


def check_guidance_interval(interval: Any) -> None:
    """Raise a ValueError unless the interval is None or two noise levels (a, b) with 0 ≤ a < b; b may be infinite."""
    if interval is None:
        return
    pair = isinstance(interval, (tuple, list)) and len(interval) == 2
    if not (pair and all(isinstance(level, numbers.Real) for level in interval) and 0 <= interval[0] < interval[1]):
        raise ValueError(f"guidance_interval: expected noise levels (a, b) with 0 <= a < b, got {interval!r}")


def check_parallel(parallel: str | None, *, guided: bool, seeded: bool) -> None:
    """Raise a ValueError unless `parallel` is None, or "guidance" in one of two processes that can share a run.

    Args:
        parallel: the option of a call.
        guided: there are two passes.
        seeded: the call has a seed, without which the processes would draw different noise.
    """
    if parallel is None:
        return
    if parallel != "guidance":
        raise ValueError(f"parallel: expected None or 'guidance', got {parallel!r}")
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    count = distributed.get_world_size() if started else 1
    if count != 2:
        raise ValueError(
            f"parallel: expected 2 processes, one per pass of guidance, got {count}: start them with "
            "torchrun --nproc-per-node 2, in Python with torch.distributed.init_process_group"
        )
    if not guided:
        raise ValueError("parallel: expected a guidance_scale over 1, got 1, at which there is one pass")
    if not seeded:
        raise ValueError("parallel: expected a seed in both processes (generator), got None")


def exchange(prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Swap the predictions of two processes.

    Args:
        prediction: [B,C,h,w], in the first process the unconditional one, in the second the conditional one.

    Returns:
        Both, in this order, in both processes.
    """
    both = [torch.empty_like(prediction) for _ in range(2)]
    torch.distributed.all_gather(both, prediction.contiguous())
    return both[0], both[1]


def guides_at(sigma: float, interval: tuple[float, float]) -> bool:
    """Return whether a step at noise level σ is guided: a < σ ≤ b (arXiv 2404.07724 eq. 5)."""
    return interval[0] < sigma <= interval[1]


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
