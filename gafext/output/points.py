"""Points on the surface of a head, coloured by the views that see them: where splat trainers begin."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gafext.cameras import Cameras
from gafext.heads.identity import neutral_head
from gafext.heads.render import render

COUNT = 20_000  # at most; 3DGS itself begins with 100,000 random ones
_SIZE = 256  # of the depth maps


class Points(NamedTuple):
    """N points in world coordinates."""

    positions: np.ndarray  # [N,3] float32
    normals: np.ndarray  # [N,3] float32, of unit length
    colours: np.ndarray  # [N,3] uint8


def neutral_points(images: Tensor, cameras: Cameras, *, count: int = COUNT) -> Points:
    """Sample the neutral head where the cameras see it, with the colours of the views there.

    Each point is the surface behind a pixel of one view, so that the view sees it by construction.

    Args:
        images: views [V,3,S,S] in [0,1].
        cameras: V cameras.
        count: number of points, divided evenly over the views.

    Returns:
        At most `count` points.
    """
    lenses = cameras.intrinsics(_SIZE)
    found = []
    for view, image in enumerate(images):
        seen = render(neutral_head(), cameras.w2c[view][None], _SIZE, intrinsics=lenses[view], supersample=1)
        hit = seen.depth[0, 0, 0].isfinite()
        rows, columns = hit.nonzero(as_tuple=True)
        kept = torch.linspace(0, max(0, len(rows) - 1), min(len(rows), count // len(images))).long()
        pixels = torch.stack([columns[kept], rows[kept]], dim=-1) + 0.5  # [n,2]
        (fx, _, cx), (_, fy, cy), _ = lenses[view].tolist()
        rays = torch.cat([(pixels - torch.tensor([cx, cy])) / torch.tensor([fx, fy]), torch.ones(len(kept), 1)], dim=1)
        depth = seen.depth[0, 0, 0, rows[kept], columns[kept]]
        rotation, translation = cameras.w2c[view, :3, :3], cameras.w2c[view, :3, 3]
        positions = (rays * depth[:, None] - translation) @ rotation
        encoded = seen.normals[0, 0, :, rows[kept], columns[kept]].T * 2 - 1  # axes of the viewer
        normals = encoded * torch.tensor([1.0, -1.0, -1.0]) @ rotation
        grid = pixels / _SIZE * 2 - 1
        colours = torch.nn.functional.grid_sample(image[None], grid[None, None], align_corners=False)[0, :, 0].T
        found.append((positions, normals, colours))
    positions, normals, colours = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return Points(positions.numpy(), normals.numpy(), (colours * 255).round().clamp(0, 255).byte().numpy())


def write_ply(path: Path, points: Points) -> None:
    """Write x, y, z, nx, ny, nz, red, green, blue of every point, in binary: the fields that 3DGS reads."""
    columns = dict(zip(("x", "y", "z"), points.positions.T, strict=True))
    columns |= dict(zip(("nx", "ny", "nz"), points.normals.T, strict=True))
    columns |= dict(zip(("red", "green", "blue"), points.colours.T, strict=True))
    names = {np.dtype(np.float32): "float", np.dtype(np.uint8): "uchar"}
    rows = np.empty(len(points.positions), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        rows[name] = column
    properties = "".join(f"property {names[column.dtype]} {name}\n" for name, column in columns.items())
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(rows)}\n{properties}end_header\n"
    path.write_bytes(header.encode() + rows.tobytes())
