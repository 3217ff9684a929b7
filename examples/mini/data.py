"""Training data: procedural heads, and cameras around them."""

from __future__ import annotations

import torch
from torch import Tensor

from gafext import cameras, heads

RADIUS = 4.0


def generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Create the random generator of one step, so that a resumed run equals an uninterrupted one."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def draw_heads(count: int, random: torch.Generator, device: torch.device | str) -> heads.Heads:
    numbers = heads.TRAIN_IDENTITIES
    return heads.make_heads(torch.randint(numbers.start, numbers.stop, (count,), generator=random), device)


def _between(low: float, high: float, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)


def _matrices(azimuth: Tensor, elevation: Tensor, radius: Tensor) -> Tensor:
    """Compute world-to-camera matrices [...,4,4] from degrees, with the conventions of `gafext.cameras.orbit`."""
    azimuth, elevation = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    directions = [azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()]
    positions = radius[..., None] * torch.stack(directions, dim=-1)
    return cameras.look_at_origin(positions.flatten(0, -2)).unflatten(0, azimuth.shape)


def view_cameras(count: int, views: int, random: torch.Generator) -> Tensor:
    """Draw cameras [count,views,4,4]: orbits as of the command line for 2/3 of the heads, else random frontal views."""
    start = torch.where(_between(0, 1, (count, 1), random) < 0.4, 0.0, _between(-180, 180, (count, 1), random))
    orbit = start + torch.arange(views) * 360 / views
    orbits = _between(0, 1, (count, 1), random) < 2 / 3
    azimuth = torch.where(orbits, orbit, _between(-100, 100, (count, views), random))
    level = _between(0, 1, (count, 1), random) < 0.4
    elevation = torch.where(level, 0.0, _between(-10, 25, (count, 1), random)).expand(-1, views)
    elevation = torch.where(orbits, elevation, _between(-15, 25, (count, views), random))
    usual = _between(0, 1, (count, 1), random) < 0.6
    radius = torch.where(usual, RADIUS, _between(3.7, 4.4, (count, 1), random)).expand(-1, views)
    return _matrices(azimuth, elevation, radius)


def portrait_cameras(count: int, random: torch.Generator) -> Tensor:
    """Draw frontal cameras [count,1,4,4] for portraits."""
    azimuth, elevation = _between(-30, 30, (count, 1), random), _between(-10, 10, (count, 1), random)
    return _matrices(azimuth, elevation, torch.full_like(azimuth, RADIUS))
