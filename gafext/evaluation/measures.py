"""Measures of image quality: PSNR, also of the face alone, SSIM, sharpness, distance of patches, consistency."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.cameras import Cameras

SAME_DEPTH = 0.02  # world units: two views see the same surface point if their depths differ by less
STEEP = 0.15  # world units over 3 pixels: a larger range is an edge, or a surface seen at a grazing angle
FACE_MARGIN = 1 / 64  # of the image's side: the surroundings of eyes, brows, nose and lips that count as the face
# Of `patch_distance`: patches per image and level, their side in pixels, directions, largest side of the last level.
PATCHES, PATCH, DIRECTIONS, SMALLEST = 128, 7, 512, 16
_NO_ERROR = 1e-10  # 100 dB


def psnr(left: Tensor, right: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image: -10 log10 of the mean squared difference.

    Args:
        left: [N,3,H,W], clamped to [0,1].
        right: [N,3,H,W] in [0,1].

    Returns:
        [N] in dB, at most 100.
    """
    difference = left.float().clamp(0, 1) - right.float()
    return -10 * difference.square().flatten(1).mean(1).clamp(min=_NO_ERROR).log10()


def ssim(left: Tensor, right: Tensor) -> Tensor:
    """Compute the structural similarity of each image, averaged over pixels and colours.

    Args:
        left: [N,3,H,W], clamped to [0,1].
        right: [N,3,H,W] in [0,1].

    Returns:
        [N], at most 1.

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


def face_psnr(left: Tensor, right: Tensor, face: Tensor) -> Tensor:
    """Compute the PSNR of each image over its face.

    Args:
        left: [N,3,H,W], clamped to [0,1].
        right: [N,3,H,W] in [0,1].
        face: [N,1,H,W], positive on eyes, brows, nose and lips (`Renders.face`); FACE_MARGIN around them counts too.

    Returns:
        [N] in dB; NaN where no face is seen.
    """
    margin = round(FACE_MARGIN * face.shape[-1])
    seen = F.max_pool2d((face > 0).float(), 2 * margin + 1, 1, padding=margin)
    error = ((left.clamp(0, 1) - right).square().mean(1, keepdim=True) * seen).flatten(1).sum(1)
    return -10 * (error / seen.flatten(1).sum(1)).clamp(min=_NO_ERROR).log10()


def sharpness(left: Tensor, right: Tensor, alpha: Tensor) -> float:
    """Compute the share of the true images' gradient energy that a set of images has, inside the silhouettes.

    Sum of squared differences of neighbouring pixels of `left`, over that of `right`. Blurred images have less than 1,
    noisy ones more. The silhouette itself does not count: its edge is most of a picture's energy. All images have one
    sum, because backs of heads, which have hardly any energy, would lead a mean of their shares.

    Args:
        left: [N,3,H,W], clamped to [0,1].
        right: [N,3,H,W] in [0,1], the true images.
        alpha: [N,1,H,W] in [0,1].

    Returns:
        Share, 0 or more.
    """
    inside = -F.max_pool2d(-(alpha > 0.999).float(), 3, 1, padding=1)

    def energy(picture: Tensor) -> Tensor:
        along = (picture.diff(dim=-2).square() * inside[..., 1:, :]).sum()
        return along + (picture.diff(dim=-1).square() * inside[..., 1:]).sum()

    return (energy(left.clamp(0, 1)) / energy(right)).item()


def patch_distance(left: Tensor, right: Tensor) -> float:
    """Compare two sets of images by their patches on all scales: a perceptual distance that needs no trained network.

    Sliced Wasserstein distance of PATCH x PATCH patches of the levels of a Laplacian pyramid, mean over levels. Unlike
    in the paper both sets are normalised by the true one's moments of each colour, so that missing contrast counts.
    Patches and directions are always the same.

    Args:
        left: [N,3,S,S], clamped to [0,1].
        right: [N,3,S,S] in [0,1], the true images.

    Returns:
        Distance times 1000; 0 for the same images.

    Source: Karras, Aila, Laine, Lehtinen: Progressive growing of GANs, 2018, section 5.
    """
    numbers = torch.Generator().manual_seed(0)
    distances = []
    for ours, true in zip(_laplacian(left.float().clamp(0, 1)), _laplacian(right.float()), strict=True):
        places = torch.randint((true.shape[-1] - PATCH + 1) ** 2, (len(true), 1, PATCHES), generator=numbers)
        places = places.to(true.device)
        made, wanted = (_chosen(F.unfold(level, PATCH), places) for level in (ours, true))
        mean, spread = (moment(wanted, dim=(0, 2), keepdim=True) for moment in (torch.mean, torch.std))
        patches = [((chosen - mean) / spread.clamp(min=1e-8)).flatten(1) for chosen in (made, wanted)]
        directions = torch.randn(3 * PATCH**2, DIRECTIONS, generator=numbers).to(true.device)
        directions = directions / directions.norm(dim=0)
        one, other = ((patch @ directions).sort(dim=0).values for patch in patches)
        distances.append((one - other).abs().mean().item())
    return 1000 * sum(distances) / len(distances)


def _laplacian(pictures: Tensor) -> list[Tensor]:
    """Split [N,3,S,S] into the differences of successive halvings; the last level is the image of SMALLEST pixels."""
    levels = []
    while pictures.shape[-1] > SMALLEST:
        half = F.avg_pool2d(pictures, 2)
        levels.append(pictures - F.interpolate(half, pictures.shape[-2:], mode="bilinear"))
        pictures = half
    return [*levels, pictures]


def _chosen(patches: Tensor, places: Tensor) -> Tensor:
    """Choose patches [N,147,P] at places [N,1,n]: [N n,3,49]."""
    chosen = patches.gather(2, places.expand(-1, patches.shape[1], -1))
    return chosen.movedim(1, 2).flatten(0, 1).unflatten(1, (3, -1))


def _range(depth: Tensor) -> Tensor:
    """Compute the range of depths in each 3 x 3 window, [V,1,S,S]."""
    return F.max_pool2d(depth, 3, 1, padding=1) + F.max_pool2d(-depth, 3, 1, padding=1)


def consistency(pictures: Tensor, depth: Tensor, cameras: Cameras) -> float:
    """Compare the colours of each surface point in the views that see it, as a PSNR.

    Args:
        pictures: views [V,3,S,S] in [0,1].
        depth: camera z of the true surface [V,1,S,S], infinite on the background.
        cameras: V cameras.

    Returns:
        PSNR in dB; NaN if no point is visible in two views.
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
        grid = (there[:, :2] / there[:, 2:] * 2 * focal / size)[None, None]  # [1,1,n,2], -1 to 1 over the image
        surface = F.grid_sample(depth[other][None], grid, mode="nearest", align_corners=False)[0, 0, 0]
        inside = F.grid_sample(smooth[other].float()[None, None], grid, mode="nearest", align_corners=False)[0, 0, 0]
        visible = ((surface - there[:, 2]).abs() < SAME_DEPTH) & (inside > 0)
        colours = F.grid_sample(pictures[other][None], grid, padding_mode="border", align_corners=False)[0, :, 0]
        errors.append((colours - pictures[view][:, seen])[:, visible].square().mean(0))
    error = torch.cat(errors) if errors else torch.empty(0)
    return -10 * math.log10(max(error.mean().item(), _NO_ERROR)) if len(error) else math.nan
