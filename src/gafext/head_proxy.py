"""Normal maps of a plain head, so that one portrait is enough where a FLAME mesh is not at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from gafext.cameras import Cameras

SEMI_AXES = (0.65, 0.90, 0.75)
"""Half a head's width, height and depth in world units: its height is 86 % of the default orbit's frame."""


def ellipsoid_normals(cameras: Cameras, size: int) -> Tensor:
    """Camera-space normals of an ellipsoid at the origin, one ray a pixel centre.

    value = n / 2 + 0.5 with n the unit normal in the viewer's axes: x right, y up, z towards the viewer.

    Args:
        cameras: V cameras, anywhere in the world; one inside the ellipsoid or facing away sees background.
        size: height and width in pixels, at least 1.

    Returns:
        [V,3,size,size] float32 in [0,1]; the background is 0.5.

    Source: the normal maps that condition GAF, arXiv 2412.10209; there they are of a FLAME mesh.
    """
    if size < 1:
        raise ValueError(f"size: expected >= 1, got {size}")
    offsets = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5 - size / 2) / cameras.focal(size)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [size,size,3], OpenCV camera axes
    return torch.stack([_normals(c2w, rays) for c2w in cameras.c2w.double()])


def _normals(c2w: Tensor, rays: Tensor) -> Tensor:
    """One view's encoded normals [3,H,W]: solves |o + t d| = 1, the ellipsoid scaled to a unit sphere."""
    semi_axes = torch.tensor(SEMI_AXES, dtype=rays.dtype, device=rays.device)
    rotation = c2w[:3, :3]
    origin = c2w[:3, 3] / semi_axes  # [3]
    direction = rays @ rotation.T / semi_axes  # [H,W,3]
    a, b, c = direction.square().sum(-1), direction @ origin, origin @ origin - 1
    discriminant = b.square() - a * c
    distance = (-b - discriminant.clamp(min=0).sqrt()) / a  # the nearer root: negative inside and behind
    hit = (discriminant >= 0) & (distance > 0)
    gradient = (origin + distance[..., None] * direction) / semi_axes  # of |x / semi_axes|^2 / 2
    normals = torch.nn.functional.normalize(gradient @ rotation, dim=-1)
    normals = normals * normals.new_tensor([1.0, -1.0, -1.0])  # OpenCV to the viewer's axes
    return torch.where(hit[..., None], normals / 2 + 0.5, 0.5).permute(2, 0, 1).float()
