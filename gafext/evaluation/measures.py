"""What pictures are compared by: PSNR, SSIM, and whether the views agree with each other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.cameras import Cameras

SAME_DEPTH = 0.02  # world units: within them a surface point is the one that another view sees
STEEP = 0.15  # world units over 3 pixels: more is an edge, or a surface seen from the side
_NO_ERROR = 1e-10  # 100 dB


def psnr(left: Tensor, right: Tensor) -> Tensor:
    """-10 log10 of the mean squared difference of each picture: [N,3,H,W] in [0,1], twice -> [N] dB, at most 100."""
    return -10 * (left.clamp(0, 1) - right).square().flatten(1).mean(1).clamp(min=_NO_ERROR).log10()


def ssim(left: Tensor, right: Tensor) -> Tensor:
    """Structural similarity of each picture, the mean over its pixels and colours: [N,3,H,W] in [0,1], twice -> [N].

    Source: Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, 2004; a Gaussian of 11 pixels with sigma 1.5.
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
    variances = mean(left * left) - a * a + mean(right * right) - b * b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (variances + c2))
    return similarity.flatten(1).mean(1)


def _range(depth: Tensor) -> Tensor:
    """How far apart the depths of 3 x 3 pixels lie, [V,1,S,S]."""
    return F.max_pool2d(depth, 3, 1, padding=1) + F.max_pool2d(-depth, 3, 1, padding=1)


def consistency(pictures: Tensor, depth: Tensor, cameras: Cameras) -> float:
    """How alike one surface point's colours are in the views that see it, in dB like `psnr`.

    Args:
        pictures: [V,3,S,S] in [0,1].
        depth: [V,1,S,S] camera z of the true surface, infinite on the background.
        cameras: V of them.

    Returns:
        The decibels; NaN where no point is seen twice.
    """
    size, w2c = pictures.shape[-1], cameras.w2c
    focal = cameras.focal(size)
    offsets = (torch.arange(size) + 0.5 - size / 2) / focal
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [S,S,3]
    sheer, background = _range(depth) > STEEP, depth.isinf()
    smooth = ~(sheer | background)[:, 0]  # [V,S,S]: at an edge a pixel has the colours of two surfaces
    errors = []
    for view, other in ((v, o) for v in range(len(pictures)) for o in range(len(pictures)) if v != o):
        seen = smooth[view]
        points = rays[seen] * depth[view, 0][seen][:, None]  # [n,3], in this view's camera
        world = (points - w2c[view, :3, 3]) @ w2c[view, :3, :3]
        there = world @ w2c[other, :3, :3].T + w2c[other, :3, 3]
        grid = (there[:, :2] / there[:, 2:] * 2 * focal / size)[None, None]  # [1,1,n,2], -1 to 1 over the picture
        surface = F.grid_sample(depth[other][None], grid, mode="nearest", align_corners=False)[0, 0, 0]
        inside = F.grid_sample(smooth[other].float()[None, None], grid, mode="nearest", align_corners=False)[0, 0, 0]
        visible = ((surface - there[:, 2]).abs() < SAME_DEPTH) & (inside > 0)
        colours = F.grid_sample(pictures[other][None], grid, padding_mode="border", align_corners=False)[0, :, 0]
        errors.append((colours - pictures[view][:, seen])[:, visible].square().mean(0))
    error = torch.cat(errors) if errors else torch.empty(0)
    return -10 * math.log10(max(error.mean().item(), _NO_ERROR)) if len(error) else math.nan
