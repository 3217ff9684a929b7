"""How good generated views are: held-out heads, three measures, baselines, and what becomes worse when a part is gone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext import heads, images
from gafext.cameras import Cameras, orbit
from gafext.heads import Renders

PORTRAIT_AZIMUTH, PORTRAIT_ELEVATION = 25.0, 8.0  # degrees: portraits of held-out heads come from within these
SAME_DEPTH = 0.03  # world units: within them a surface point is the one that another view sees


def psnr(left: Tensor, right: Tensor) -> Tensor:
    """-10 log10 of the mean squared difference of each picture: [N,3,H,W] in [0,1], twice -> [N] dB."""
    return -10 * (left.clamp(0, 1) - right).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(left: Tensor, right: Tensor) -> Tensor:
    """Structural similarity of each picture, the mean over its pixels and colours: [N,3,H,W] in [0,1], twice -> [N].

    Source: Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, 2004: Gaussian window of 11 pixels, sigma 1.5.
    """
    offsets = torch.arange(11, dtype=left.dtype, device=left.device) - 5
    line = (-(offsets**2) / (2 * 1.5**2)).exp()
    line = line / line.sum()
    window = (line[:, None] * line).expand(left.shape[1], 1, 11, 11)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=x.shape[1])

    left = left.clamp(0, 1)
    a, b = mean(left), mean(right)
    covariance = mean(left * right) - a * b
    spread = mean(left * left) - a * a + mean(right * right) - b * b
    c1, c2 = 0.01**2, 0.03**2
    map_ = (2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (spread + c2))
    return map_.flatten(1).mean(1)


def consistency(pictures: Tensor, depth: Tensor, cameras: Cameras) -> float:
    """How alike one surface point's colours are in the views that see it, in dB like `psnr`; NaN where none is seen twice.

    Args:
        pictures: [V,3,S,S] in [0,1].
        depth: [V,1,S,S] camera z of the true surface, infinite on the background.
        cameras: V of them.
    """
    size, errors = pictures.shape[-1], []
    w2c, intrinsics = cameras.w2c.to(pictures.device), cameras.intrinsics(size)[0].to(pictures.device)
    centres = torch.arange(size, device=pictures.device) + 0.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ torch.linalg.inv(intrinsics).T
    for view in range(len(pictures)):
        seen = depth[view, 0].isfinite()
        points = rays[seen] * depth[view, 0][seen][:, None]  # [n,3], in this view's camera
        world = (points - w2c[view, :3, 3]) @ w2c[view, :3, :3]
        for other in range(len(pictures)):
            if other == view:
                continue
            there = world @ w2c[other, :3, :3].T + w2c[other, :3, 3]
            pixel = there @ intrinsics.T
            grid = (pixel[:, :2] / pixel[:, 2:] / size * 2 - 1)[None, None]  # [1,1,n,2]
            surface = F.grid_sample(depth[other][None], grid, mode="nearest", align_corners=False)[0, 0, 0]
            visible = (surface - there[:, 2]).abs() < SAME_DEPTH
            colours = F.grid_sample(pictures[other][None], grid, align_corners=False)[0, :, 0].T  # [n,3]
            errors.append((colours - pictures[view][:, seen].T)[visible].square().mean(1))
    error = torch.cat(errors)
    return -10 * math.log10(max(error.mean().item(), 1e-10)) if len(error) else math.nan


@dataclass(frozen=True)
class Subject:
    """A held-out head: its portrait, and the truth about its views."""

    identity: int
    portrait: Tensor  # [3,S,S] in [0,1]
    cameras: Cameras
    views: Renders  # [V,...]
    neutral: Tensor  # [V,3,S,S]: the normal maps that stand in for its own


def subjects(count: int, size: int, cameras: Cameras | None = None, *, first: int = 0) -> list[Subject]:
    """`count` heads that nothing was trained on, each seen by `cameras` (4 around it), portrait from near the front."""
    cameras = cameras or orbit(4)
    identities = list(heads.TEST_IDENTITIES[first : first + count])
    neutral = heads.head_normals(cameras, size)
    made = []
    for identity in identities:
        head = heads.make_heads([identity])
        portrait = heads.render(head, portrait_camera(identity).w2c, size, fov=cameras.fov).rgb[0, 0]
        views = heads.render(head, cameras.w2c, size, fov=cameras.fov)
        made.append(Subject(identity, portrait, cameras, Renders(*(tensor[0] for tensor in views)), neutral))
    return made


def portrait_camera(identity: int) -> Cameras:
    """Where a held-out head's portrait is taken from: it depends on the identity alone."""
    numbers = torch.Generator().manual_seed(identity)
    azimuth, elevation = (2 * torch.rand(2, generator=numbers, dtype=torch.float64) - 1).tolist()
    return orbit(1, elevation=PORTRAIT_ELEVATION * elevation, azimuth_start=PORTRAIT_AZIMUTH * azimuth)


def rows(pictures: Iterable[Tensor]) -> Tensor:
    """Pictures [3,S,S] side by side."""
    return torch.cat(list(pictures), dim=2)


def as_portrait(picture: Tensor):
    """The 8-bit picture that a user would pass."""
    return images.to_pil(picture[None] * 2 - 1)[0]
