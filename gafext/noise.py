"""Noise that depends only on (seed, portrait, view): not on the device, the batch size or the number of views."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_DRAWN_BY_SCHEDULER = 2**21
"""Stands in for a step's number in the seeds of `view_generators`; those of `view_noise` are smaller."""


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


def resolve_seeds(generator: object, *, portraits: int) -> int | tuple[int, ...]:
    """Return the seed of a run, or one per portrait if `generator` is a list.

    Args:
        generator: what `resolve_seed` accepts, or a list of it.
        portraits: number of portraits, B.

    Raises:
        ValueError: the list does not have B entries, or an entry is not accepted.
    """
    if not isinstance(generator, (list, tuple)):
        return resolve_seed(generator)  # pyright: ignore[reportArgumentType]
    if len(generator) != portraits:
        raise ValueError(f"generator: expected {portraits}, one per portrait, got a list of {len(generator)}")
    return tuple(map(resolve_seed, generator))


def is_seeded(generator: object) -> bool:
    """Return whether a call's `generator` determines all noise: no seed is left to chance."""
    return None not in generator if isinstance(generator, (list, tuple)) else generator is not None


def view_noise(
    seed: int | tuple[int, ...], *, portraits: int, views: int, shape: tuple[int, ...], step: int = 0
) -> Tensor:
    """Draw standard normal noise for every view of every portrait.

    Args:
        seed: the run's seed, from `resolve_seed`; or one per portrait, whose noise is then that of a run of its own.
        portraits: number of portraits, B.
        views: number of views, V; the noise of view i does not depend on V.
        shape: shape (C,h,w) of one view's latents.
        step: 0 for the initial noise; 1, 2, ... for the noise that solvers with eta > 0 add at each step.

    Returns:
        [B*V,*shape] float32 on the CPU; the view index varies fastest.
    """
    streams = map(np.random.default_rng, _sequences(seed, portraits, views, step))
    return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))


def view_generators(seed: int | tuple[int, ...], *, portraits: int, views: int) -> list[torch.Generator]:
    """Return a generator on the CPU for every view of every portrait, for schedulers that draw their own noise.

    Args:
        seed, portraits, views: those of `view_noise`.

    Returns:
        B*V generators; the view index varies fastest.
    """
    states = (sequence.generate_state(2) for sequence in _sequences(seed, portraits, views, _DRAWN_BY_SCHEDULER))
    return [torch.Generator().manual_seed(int(low) + (int(high) << 32)) for low, high in states]


def _sequences(seed: int | tuple[int, ...], portraits: int, views: int, step: int) -> Iterator[np.random.SeedSequence]:
    # NumPy derives independent streams from spawn keys; with Philox or PCG64 alone, offsets would have to be disjoint.
    for portrait in range(portraits):
        own, index = (seed[portrait], 0) if isinstance(seed, tuple) else (seed, portrait)
        for view in range(views):
            yield np.random.SeedSequence(own, spawn_key=(index, view, step))
