"""Points on the surface of a head, coloured by the views that see them: where splat trainers begin."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gafext.cameras import Cameras
from gafext.heads import Heads, head_surface
from gafext.mesh import Mesh

COUNT = 20_000  # at most; 3DGS itself begins with 100,000 random ones
_SIZE = 256  # of the depth maps


class Points(NamedTuple):
    """N points in world coordinates."""

    positions: np.ndarray  # [N,3] float32
    normals: np.ndarray  # [N,3] float32, of unit length
    colours: np.ndarray  # [N,3] uint8


def surface_points(
    images: Tensor, cameras: Cameras, surface: Mesh | Heads | None = None, *, count: int = COUNT
) -> Points:
    """Sample a surface where the cameras see it, with the colours of the views there.

    Each point is the surface behind a pixel of one view, so that the view sees it by construction.

    Args:
        images: views [V,3,S,S] in [0,1].
        cameras: V cameras.
        surface: a mesh or one drawn head; None: the neutral head.
        count: number of points, divided evenly over the views.

    Returns:
        At most `count` points.
    """
    if isinstance(surface, Mesh):
        seen = surface.render(cameras, _SIZE, samples=1)
    else:
        seen = head_surface(cameras, _SIZE, surface)
    found = []
    for view, (lens, w2c) in enumerate(zip(cameras.intrinsics(_SIZE), cameras.w2c, strict=True)):
        rows, columns = seen.depth[view, 0].isfinite().nonzero(as_tuple=True)
        kept = torch.linspace(0, max(0, len(rows) - 1), min(len(rows), count // len(images))).long()
        rows, columns = rows[kept], columns[kept]
        pixels = torch.stack([columns, rows], dim=-1) + 0.5  # [n,2]
        rays = torch.cat([pixels, torch.ones(len(kept), 1)], dim=1) @ torch.linalg.inv(lens).T
        positions = (rays * seen.depth[view, 0, rows, columns, None] - w2c[:3, 3]) @ w2c[:3, :3]
        encoded = torch.nn.functional.normalize(seen.normals[view, :, rows, columns].T * 2 - 1, dim=1)
        normals = encoded * torch.tensor([1.0, -1.0, -1.0]) @ w2c[:3, :3]  # from the viewer's axes
        grid = (pixels / _SIZE * 2 - 1)[None, None]
        options = {"padding_mode": "border", "align_corners": False}
        colours = torch.nn.functional.grid_sample(images[view][None], grid, **options)[0, :, 0].T
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
