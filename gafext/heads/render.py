"""Rendering of procedural heads: closed-form intersection of rays and ellipsoids, batched over heads and views.

In camera axes a pixel's ray is t d with d = (x, y, 1). It intersects an ellipsoid |A (R^T (t d - p) - c)| = 1 where
a t^2 + 2 b t + k = 0; a, b and the discriminant b^2 - a k are polynomials in (x, y), of degree 2, 1 and 2. Their
coefficients are computed in float64, once per part and view; pixels cost three polynomials and a square root per part.
Only the nearest part of each pixel is shaded. The normal is the gradient g + t Q d, with Q = (A R^T)^T (A R^T).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.cameras import DEFAULT_FOV, Cameras
from gafext.heads.identity import CLIPPED, FACE, PARTS, Heads, neutral_head

BACKGROUND = 1.0  # white, as the background that `gafext.images` gives transparent portraits
_CLIPPED = [PARTS.index(name) for name in CLIPPED]
_FACE = [PARTS.index(name) for name in FACE]
_EYES = [PARTS.index(name) for name in ("eye_left", "eye_right")]
_PUPIL, _IRIS = 0.95, 0.80  # cosines of their angular radii
_CPU_VIEWS = 1  # per batch: its tensors fit a core's cache


class Renders(NamedTuple):
    """Images of N heads from V cameras each."""

    rgb: Tensor  # [N,V,3,S,S] in [0,1], over white
    normals: Tensor  # [N,V,3,S,S]: n/2 + 1/2 in the viewer's axes (x right, y up, z to the viewer); background 0.5
    alpha: Tensor  # [N,V,1,S,S] in [0,1]
    depth: Tensor  # [N,V,1,S,S]: camera z of the nearest surface, infinite on the background
    face: Tensor  # [N,V,1,S,S] in [0,1]: the share of eyes, lids, brows, nose and lips


@torch.no_grad()
def render(
    heads: Heads,
    w2c: Tensor,
    size: int,
    *,
    fov: float = DEFAULT_FOV,
    intrinsics: Tensor | None = None,
    supersample: int = 2,
) -> Renders:
    """Render heads.

    Args:
        heads: N heads.
        w2c: [N,V,4,4] world-to-camera matrices, OpenCV axes, or [V,4,4] for all heads.
        size: S, height and width in pixels.
        fov: field of view of all cameras, in degrees.
        intrinsics: [3,3] of all cameras in pixels, in place of `fov`.
        supersample: rays per pixel along each axis; depth is their minimum, all else their mean.

    Returns:
        The images, float32 on the heads' device.
    """
    w2c = w2c.to(heads.centre.device).double().expand(len(heads), -1, 4, 4)
    focal, centre = Cameras(torch.eye(4)[None], fov).focal(size), size / 2
    lens = (focal, focal, centre, centre) if intrinsics is None else intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]].tolist()
    rays = _rays(size, supersample, lens, w2c.device)
    views = w2c.shape[1]
    at_once = _CPU_VIEWS if w2c.device.type == "cpu" else max(1, 2**30 // (len(PARTS) * rays.shape[1] * 4))
    owner = torch.arange(len(heads), device=w2c.device).repeat_interleave(views)
    parts = [
        _pool(_trace(heads, rows, matrices, rays), size, supersample)
        for rows, matrices in zip(owner.split(at_once), w2c.flatten(0, 1).split(at_once), strict=True)
    ]
    return Renders(*(torch.cat(tensors).unflatten(0, (-1, views)) for tensors in zip(*parts, strict=True)))


def head_normals(cameras: Cameras, size: int, head: Heads | None = None) -> Tensor:
    """Render normal maps of one head, for portraits without normal maps: [V,3,size,size] in [0,1].

    Args:
        cameras: V cameras.
        size: height and width in pixels.
        head: the head; None: the neutral one.
    """
    return head_surface(cameras, size, head, supersample=2).normals


def head_surface(cameras: Cameras, size: int, head: Heads | None = None, *, supersample: int = 1) -> Renders:
    """Render one head, None: the neutral one, from V cameras, which may have intrinsics of their own: [V,...]."""
    head = neutral_head() if head is None else head
    if cameras.has_fov:
        renders = render(head, cameras.w2c, size, fov=cameras.fov, supersample=supersample)
        return Renders(*(images[0] for images in renders))
    views = [
        render(head, w2c[None], size, intrinsics=lens, supersample=supersample)
        for w2c, lens in zip(cameras.w2c, cameras.intrinsics(size), strict=True)
    ]
    return Renders(*(torch.cat(images, dim=1)[0] for images in zip(*views, strict=True)))


def _rays(size: int, supersample: int, lens: Sequence[float], device: torch.device) -> Tensor:
    """Compute the monomials x^2, xy, y^2, x, y, 1 of the rays through the samples of all pixels: [6,samples] float32.

    `lens`: fx, fy, cx, cy in pixels.
    """
    count = size * supersample
    samples = (torch.arange(count, dtype=torch.float64, device=device) + 0.5) / supersample
    fx, fy, cx, cy = lens
    y, x = (t.flatten() for t in torch.meshgrid((samples - cy) / fy, (samples - cx) / fx, indexing="ij"))
    return torch.stack([x * x, x * y, y * y, x, y, torch.ones_like(x)]).float()


def _quadratic(matrix: Tensor) -> Tensor:
    """Compute the coefficients [...,6] of d^T M d in the rays' monomials, M [...,3,3] symmetric."""
    entries = [(0, 0, 1), (0, 1, 2), (1, 1, 1), (0, 2, 2), (1, 2, 2), (2, 2, 1)]
    return torch.stack([factor * matrix[..., i, j] for i, j, factor in entries], dim=-1)


def _trace(heads: Heads, rows: Tensor, w2c: Tensor, rays: Tensor) -> tuple[Tensor, ...]:
    """Trace B views of the heads at indices `rows`; returns the channels of Renders, [B,channels,pixels] each."""
    rotation, eye = w2c[:, :3, :3], -(w2c[:, :3, :3].transpose(1, 2) @ w2c[:, :3, 3:])[..., 0]  # [B,3,3], [B,3]
    inverse = heads.inverse[rows]
    to_sphere = inverse @ rotation[:, None].transpose(2, 3)  # [B,P,3,3]
    start = (inverse @ (eye[:, None] - heads.centre[rows])[..., None])[..., 0]  # [B,P,3]: the eye in sphere space
    quadric = to_sphere.transpose(2, 3) @ to_sphere
    gradient = (to_sphere.transpose(2, 3) @ start[..., None])[..., 0]
    outside = start.square().sum(-1) - 1
    discriminant = gradient[..., :, None] * gradient[..., None, :] - outside[..., None, None] * quadric

    never = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -1.0], dtype=torch.float64, device=rays.device)
    square = torch.where(heads.active[rows][..., None], _quadratic(discriminant), never).float() @ rays  # [B,P,pixels]
    missed = square < 0
    root = square.clamp_(min=1e-12).sqrt_()  # MKL's square root of zero takes 17 times as long
    a, b = _quadratic(quadric).float() @ rays, gradient.float() @ rays[3:]
    far = (root[:, _CLIPPED] - b[:, _CLIPPED]) / a[:, _CLIPPED]
    depth = root.add_(b).div_(a.neg_())
    clip = heads.clip[rows][:, _CLIPPED]
    slope = (clip[..., :3] @ rotation.transpose(1, 2)).float() @ rays[3:]  # of n·x along the ray
    at_eye = ((clip[..., :3] * eye[:, None]).sum(-1) + clip[..., 3]).float()[..., None]
    near = depth[:, _CLIPPED]
    near = torch.where(at_eye + near * slope >= 0, near, far)
    missed[:, _CLIPPED] |= at_eye + near * slope < 0
    depth[:, _CLIPPED] = near
    missed |= depth <= 0  # behind a camera that is near: it must not hide what is in front
    depth, part = depth.masked_fill_(missed, torch.inf).min(dim=1)  # [B,pixels]

    hit = depth.isfinite()
    t, (x, y) = depth.masked_fill(~hit, 1.0), rays[3:5]
    table = [quadric.flatten(2)[..., [0, 1, 2, 4, 5, 8]], gradient, heads.colour[rows], to_sphere[..., 2, :]]
    table = torch.cat([*table, start[..., 2:]], dim=-1).float()  # [B,P,16]
    xx, xy, xz, yy, yz, zz, gx, gy, gz, *rest = _look_up(table, part)
    normal = torch.stack(
        [gx + t * (xx * x + xy * y + xz), gy + t * (xy * x + yy * y + yz), gz + t * (xz * x + yz * y + zz)], dim=1
    )
    normal = normal * normal.square().sum(1, keepdim=True).rsqrt()
    away = normal[:, 0] * x + normal[:, 1] * y + normal[:, 2] > 0  # the inner side of a clipped part
    normal = torch.where(away[:, None], -normal, normal)  # [B,3,pixels], OpenCV axes

    colour = torch.stack(rest[:3], dim=1)
    forward = rest[6] + t * (rest[3] * x + rest[4] * y + rest[5])  # z of the point on its unit sphere
    looking = ((part == _EYES[0]) | (part == _EYES[1])) & (forward > _IRIS)
    colour = torch.where(looking[:, None], heads.iris[rows][..., None], colour)
    colour = torch.where((looking & (forward > _PUPIL))[:, None], 0.03, colour)
    light = rotation.float() @ heads.light[rows][..., None]  # [B,3,1]
    shade = ((normal * light).sum(1, keepdim=True) * 0.75 + 0.25).clamp(0, 1)
    colour = colour * torch.lerp(heads.ambient[rows][:, None, None], torch.ones_like(shade), shade)

    flip = normal.new_tensor([0.5, -0.5, -0.5])[:, None]
    alpha = hit[:, None].float()
    rgb = torch.where(hit[:, None], colour, BACKGROUND)
    features = torch.zeros(len(PARTS), device=rays.device)
    features[_FACE] = 1
    face = features[part].where(hit, 0)[:, None]
    return rgb, torch.where(hit[:, None], normal * flip + 0.5, 0.5), alpha, depth[:, None], face


def _look_up(table: Tensor, part: Tensor) -> tuple[Tensor, ...]:
    """Gather each column of [B,P,C] at the part [B,pixels] of every pixel: C tensors [B,pixels]."""
    return tuple(column.gather(1, part) for column in table.unbind(-1))


def _pool(channels: tuple[Tensor, ...], size: int, supersample: int) -> tuple[Tensor, ...]:
    """Reshape flat pixels to images; depth is the minimum over a pixel's rays, the others are means."""
    rgb, normals, alpha, depth, face = (c.unflatten(2, (size * supersample, -1)) for c in channels)
    if supersample == 1:
        return rgb, normals, alpha, depth, face
    rgb, normals, alpha, face = (F.avg_pool2d(picture, supersample) for picture in (rgb, normals, alpha, face))
    return rgb, normals, alpha, -F.max_pool2d(-depth, supersample), face
