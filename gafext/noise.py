"""Noise that depends on (seed, portrait, view) alone: not on the device, the batch or the number of views."""

from __future__ import annotations

import operator
import secrets

import numpy as np
import torch
from torch import Tensor


def resolve_seed(generator: torch.Generator | int | None) -> int:
    """The seed that names all of a run's noise.

    Args:
        generator: an integer ≥ 0; a torch.Generator, of which the initial seed counts (its state is neither read nor
            advanced, because a CUDA generator would draw other numbers than a CPU one); or None for a fresh seed.

    Returns:
        The seed, 0 or more.
    """
    if generator is None:
        return secrets.randbits(32)
    seed = generator.initial_seed() if isinstance(generator, torch.Generator) else generator
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or operator.index(seed) < 0:
        raise ValueError(f"generator: expected a torch.Generator or an integer seed of 0 or more, got {generator!r}")
    return operator.index(seed)


def view_noise(seed: int, *, portraits: int, views: int, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """Standard normal noise for every view of every portrait.

    Args:
        seed: of the run.
        portraits: B; portrait j of a batch has its own noise.
        views: V; view i of 4 and view i of 8 have the same noise.
        shape: of one view's latents, (C,h,w).
        step: 0 is the initial noise; DDIM with eta > 0 draws fresh noise at steps 1, 2, ...

    Returns:
        [B*V,*shape] float32 on the CPU, the view running fastest.
    """
    keys = [(portrait, view, step) for portrait in range(portraits) for view in range(views)]
    # A spawn key is how NumPy derives independent streams; Philox or PCG64 alone would need disjoint offsets.
    streams = (np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key)) for key in keys)
    return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))
