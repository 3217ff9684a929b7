"""Noise that depends only on (seed, portrait, view): not on the device, the batch size or the number of views."""

from __future__ import annotations

import operator
import secrets

import numpy as np
import torch
from torch import Tensor


def resolve_seed(generator: torch.Generator | int | None) -> int:
    """Return the seed that determines all noise of a run.

    Args:
        generator: an integer ≥ 0; a torch.Generator, of which only the initial seed is used (its state is neither read
            nor advanced, because CUDA and CPU generators draw different numbers); or None for a random seed.

    Returns:
        The seed, at least 0.

    Raises:
        ValueError: the generator is neither of these, or negative.
    """
    if generator is None:
        return secrets.randbits(32)
    seed = generator.initial_seed() if isinstance(generator, torch.Generator) else generator
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or operator.index(seed) < 0:
        raise ValueError(f"generator: expected a torch.Generator or an integer seed of 0 or more, got {generator!r}")
    return operator.index(seed)


def view_noise(seed: int, *, portraits: int, views: int, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """Draw standard normal noise for every view of every portrait.

    Args:
        seed: the run's seed, from `resolve_seed`.
        portraits: number of portraits, B.
        views: number of views, V; the noise of view i does not depend on V.
        shape: shape (C,h,w) of one view's latents.
        step: 0 for the initial noise; 1, 2, ... for the noise that solvers with eta > 0 add at each step.

    Returns:
        [B*V,*shape] float32 on the CPU; the view index varies fastest.
    """
    keys = [(portrait, view, step) for portrait in range(portraits) for view in range(views)]
    # NumPy derives independent streams from spawn keys; with Philox or PCG64 alone, offsets would have to be disjoint.
    streams = (np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key)) for key in keys)
    return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))
