"""Faults of the training data: files of a head, their sizes, whether its cameras agree and frame the neutral head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gafext.errors import MeshError
from gafext.heads import head_normals
from gafext.mesh import HEAD_HEIGHT, load_mesh, unusual_coverage
from gafext.training.head import Head

_FARTHEST = 0.25  # of a picture's side: a head's foreground has its centre nearer than this to where the others put it
_COARSE = 32  # pixels of the normal maps that tell whether cameras frame the neutral head


def faults_of(head: Head, *, views: int, thorough: bool) -> list[str]:
    """List what is wrong with one head, one sentence per fault.

    Args:
        head: the head.
        views: number of views that a step takes of it.
        thorough: also decode the pictures, and compare the cameras with the masks.
    """
    faults = _of_files(head, decode=thorough)
    if head.normals and len(head.normals) != len(head.pictures):
        faults.append(f"{head.name}: expected {len(head.pictures)} normal maps or none, got {len(head.normals)}")
    if few := least_views(head.name, len(head.pictures), views):
        faults.append(few)
    return faults or ([*_of_mesh(head), *_of_cameras(head)] if thorough else [])


def least_views(name: str, count: int, views: int) -> str:
    """Say that a head has fewer views than a step takes of it; empty if it has not."""
    least = max(views, 2)
    return f"{name}: expected at least {least} views (--views), got {count}" if count < least else ""


def unframed(heads: Sequence[Head]) -> str:
    """Say how many heads without normal maps have cameras that do not frame the neutral head; empty if all do.

    Normal maps of the neutral head take the place of theirs. Cameras in metres are inside it.
    """
    reasons: dict[bytes, str] = {}  # by cameras, which the moments of a subject share
    found = []
    for head in heads:
        if not head.normals and head.mesh is None:
            cameras = head.cameras
            key = cameras.w2c.numpy().tobytes() + cameras.intrinsics(1).numpy().tobytes()
            if key not in reasons:
                reasons[key] = unusual_coverage(head_normals(cameras, _COARSE))
            found += [f"{head.name}: {reasons[key]}"] if reasons[key] else []
    if not found:
        return ""
    return (
        f"heads without normals/ that get the neutral head's, {HEAD_HEIGHT} units high, and do not frame it: "
        f"{len(found)} of {len(heads)}: {found[0]}; add normals/, or scale the poses"
    )


def _of_files(head: Head, *, decode: bool) -> list[str]:
    faults, sizes = [], set()
    for path in [*head.pictures, *(mask for mask in head.masks if mask is not None), *head.normals]:
        try:
            with Image.open(path) as image:
                sizes.add(image.size)
                if decode:
                    image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises
            faults.append(f"{path}: expected a picture, got {'a damaged one' if path.is_file() else 'no such file'}")
    if len(sizes) > 1:
        got = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        faults.append(f"{head.name}: expected pictures, masks and normals of one size, got {got}")
    for width, height in sizes if len(sizes) == 1 else ():
        for known in set(head.sizes):
            wide, high = known or (1, 1)  # without w and h, the cameras are those of squares
            if abs(width * high - height * wide) > max(wide, high):  # a pixel of rounding is allowed
                wanted = f"{wide} x {high}, as w and h say" if known else "squares, because the file has no w and h"
                faults.append(f"{head.name}: expected pictures of {wanted}, got {width} x {height}")
    return faults


def _of_mesh(head: Head) -> list[str]:
    if head.mesh is None:
        return []
    try:
        reason = unusual_coverage(load_mesh(head.mesh).render(head.cameras, _COARSE).normals)
    except MeshError as error:
        return [str(error)]
    return [f"{head.mesh}: {reason}: expected a mesh in the cameras' world"] if reason else []


def _of_cameras(head: Head) -> list[str]:
    """Compare where each view sees the foreground's centre with where the others see it."""
    views = [view for view, mask in enumerate(head.masks) if mask is not None]
    if len(views) < 3:
        return []
    seen = torch.stack([_centre(head, view) for view in views])
    if not seen.isfinite().all():
        return [f"{head.name}: expected a foreground in each mask, got an empty one"]
    projections = torch.stack([head.intrinsics[view].double() @ head.w2c[view][:3].double() for view in views])
    # A point p on the ray of a view solves (P_0 - x P_2) p = 0 and (P_1 - y P_2) p = 0.
    rows = projections[:, :2] - seen[:, :, None] * projections[:, 2:]  # [V,2,4]
    errors = []
    for view in range(len(views)):
        others = torch.cat([rows[:view], rows[view + 1 :]]).flatten(0, 1)
        point = torch.linalg.lstsq(others[:, :3], -others[:, 3:]).solution
        x, y, depth = (projections[view, :, :3] @ point + projections[view, :, 3:]).flatten()
        placed = torch.stack([x, y]) / depth
        errors.append((placed - seen[view]).norm().item() if depth > 0 else math.inf)
    worst = max(range(len(views)), key=errors.__getitem__)
    if errors[worst] <= _FARTHEST:
        return []
    got = "a camera that has them behind it"
    if errors[worst] < math.inf:
        got = f"it {100 * errors[worst]:.0f} % of the side away"
    picture = head.pictures[views[worst]]
    return [
        f"{picture}: expected its foreground where the other cameras put it, got {got}: a wrong pose, picture or mask"
    ]


def _centre(head: Head, view: int) -> Tensor:
    """Compute the centre (x, y) of a view's mask in the padded square of side 1; NaN if it is empty."""
    alpha = torch.from_numpy(np.asarray(head.mask(view), dtype=np.float64))
    height, width = alpha.shape
    side = max(height, width)
    x = (torch.arange(width).double() + 0.5 + (side - width) / 2) / side
    y = (torch.arange(height).double() + 0.5 + (side - height) / 2) / side
    return torch.stack([(alpha.sum(0) * x).sum(), (alpha.sum(1) * y).sum()]) / alpha.sum()
