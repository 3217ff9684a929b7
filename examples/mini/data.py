"""Training data: procedural heads, cameras around them, and portraits that look like photographs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext import cameras, heads
from gafext.evaluation.measures import FACE_MARGIN
from gafext.models.clip import MEAN, STD

RADIUS = 4.0
FACE_WEIGHT = 8.0  # added to the weight of pixels of the face, which are few and are what one looks at
PHOTOGRAPHS = 0.5  # fraction of the portraits that look like photographs


def generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Create the random generator of one step, so that a resumed run draws what an uninterrupted one does.

    But for the pools of heads that stages draw before their first step, which begin anew.
    """
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def draw_heads(count: int, random: torch.Generator, device: torch.device | str) -> heads.Heads:
    numbers = heads.TRAIN_IDENTITIES
    return heads.make_heads(torch.randint(numbers.start, numbers.stop, (count,), generator=random), device)


def between(low: float, high: float, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Draw numbers of the shape, float64, uniform in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)


def _matrices(azimuth: Tensor, elevation: Tensor, radius: Tensor) -> Tensor:
    """Compute world-to-camera matrices [...,4,4] from degrees, with the conventions of `gafext.cameras.orbit`."""
    azimuth, elevation = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    directions = [azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()]
    positions = radius[..., None] * torch.stack(directions, dim=-1)
    return cameras.look_at_origin(positions.flatten(0, -2)).unflatten(0, azimuth.shape)


def view_cameras(count: int, views: int, random: torch.Generator) -> Tensor:
    """Draw cameras [count,views,4,4]: orbits as of the command line for 2/3 of the heads, else random frontal views."""
    start = torch.where(between(0, 1, (count, 1), random) < 0.4, 0.0, between(-180, 180, (count, 1), random))
    orbit = start + torch.arange(views) * 360 / views
    orbits = between(0, 1, (count, 1), random) < 2 / 3
    azimuth = torch.where(orbits, orbit, between(-100, 100, (count, views), random))
    level = between(0, 1, (count, 1), random) < 0.4
    elevation = torch.where(level, 0.0, between(-10, 25, (count, 1), random)).expand(-1, views)
    elevation = torch.where(orbits, elevation, between(-15, 25, (count, views), random))
    usual = between(0, 1, (count, 1), random) < 0.6
    radius = torch.where(usual, RADIUS, between(3.7, 4.4, (count, 1), random)).expand(-1, views)
    return _matrices(azimuth, elevation, radius)


def portrait_cameras(count: int, random: torch.Generator, portraits: int = 1) -> Tensor:
    """Draw frontal cameras [count,portraits,4,4] for portraits."""
    azimuth, elevation = between(-30, 30, (count, portraits), random), between(-10, 10, (count, portraits), random)
    return _matrices(azimuth, elevation, torch.full_like(azimuth, RADIUS))


def face_weights(face: Tensor, factor: int = 1) -> Tensor:
    """Compute the weights of pixels or latents in a loss from `Renders.face`.

    Args:
        face: [N,1,S,S] in [0,1].
        factor: pixels of a latent pixel's side.

    Returns:
        [N,1,S/factor,S/factor], 1 or more.
    """
    margin = round(face.shape[-1] * FACE_MARGIN)
    return F.avg_pool2d(1 + FACE_WEIGHT * F.max_pool2d(face, 2 * margin + 1, 1, padding=margin), factor)


def photographic(portraits: Tensor, alpha: Tensor, random: torch.Generator) -> Tensor:
    """Give some portraits what photographs have: backgrounds, other framing, exposure and colour casts, blur, noise.

    Args:
        portraits: [N,3,S,S] in [0,1], over white.
        alpha: [N,1,S,S] in [0,1].
        random: generator of the CPU.

    Returns:
        [N,3,S,S] in [0,1]; a fraction PHOTOGRAPHS is changed.
    """
    count, device = len(portraits), portraits.device

    def numbers(low: float, high: float, *shape: int) -> Tensor:
        return between(low, high, (count, *shape), random).float().to(device)

    zoom, shift, turn = numbers(0.85, 1.2), numbers(-0.12, 0.12, 2), torch.deg2rad(numbers(-8, 8))
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    frame = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], dim=1)
    grid = F.affine_grid(frame, list(portraits.shape), align_corners=False)
    drawn = torch.cat([portraits - (1 - alpha), alpha], dim=1)  # the head alone, and its alpha
    drawn = F.grid_sample(drawn, grid, padding_mode="border", align_corners=False)
    scenery = numbers(0, 1, 3, 1, 1) + numbers(0, 0.3, 1, 1, 1) * numbers(-1, 1, 3, 6, 6)
    scenery = F.interpolate(scenery, portraits.shape[-2:], mode="bicubic").clamp(0, 1)
    scenery = torch.where(numbers(0, 1, 1, 1, 1) < 0.75, scenery, 1.0)
    made = drawn[:, :3] + (1 - drawn[:, 3:]) * scenery
    exposure = numbers(0.75, 1.2, 1, 1, 1) * numbers(0.94, 1.06, 3, 1, 1)
    made = (made * exposure).clamp(0, 1) ** numbers(0.8, 1.25, 1, 1, 1)
    small = F.interpolate(made, scale_factor=0.5, mode="area")
    blurred = F.interpolate(small, portraits.shape[-2:], mode="bilinear")
    made = torch.lerp(made, blurred, numbers(0, 1, 1, 1, 1) * (numbers(0, 1, 1, 1, 1) < 0.4))
    noise = torch.randn(made.shape, generator=random).to(device)
    made = (made + numbers(0, 0.06, 1, 1, 1) * noise).clamp(0, 1)
    return torch.where(numbers(0, 1, 1, 1, 1) < PHOTOGRAPHS, made, portraits)


def normalized(portraits: Tensor) -> Tensor:
    """Normalise portraits [N,3,S,S] in [0,1] for the image encoder."""
    mean, std = (torch.tensor(values, device=portraits.device).view(3, 1, 1) for values in (MEAN, STD))
    return (portraits - mean) / std
