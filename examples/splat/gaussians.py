"""3D Gaussians in plain PyTorch: projection, tiles, blending, and the .ply file of 3D Gaussian Splatting.

Source: "3D Gaussian Splatting for Real-Time Radiance Field Rendering" (arXiv 2308.04079), sections 4 and 6.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from plyfile import PlyData, PlyElement
from torch import Tensor, nn

TILE = 16  # pixels
_SH = 0.28209479177387814  # the constant spherical harmonic: colour = 0.5 + _SH * f_dc


class Gaussians(nn.Module):
    """N Gaussians; the parameters are named and scaled as in the .ply file of 3DGS.

    Args:
        positions: [N,3] world coordinates.
        colours: [N,3] in [0,1].
        scale: standard deviation at the start, in world units.
    """

    def __init__(self, positions: Tensor, colours: Tensor, scale: float):
        super().__init__()
        count = len(positions)
        self.positions = nn.Parameter(positions.clone())
        self.f_dc = nn.Parameter((colours - 0.5) / _SH)
        self.opacity = nn.Parameter(torch.full((count,), -1.0))  # before the sigmoid
        self.scale = nn.Parameter(torch.full((count, 3), scale).log())
        self.rotation = nn.Parameter(torch.tensor([1.0, 0, 0, 0]).repeat(count, 1))  # w, x, y, z

    def covariance(self) -> Tensor:
        """Compute R S S^T R^T, [N,3,3]."""
        w, x, y, z = F.normalize(self.rotation, dim=-1).unbind(-1)
        rows = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
        rotation = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
        half = rotation * self.scale.exp()[:, None]
        return half @ half.transpose(1, 2)

    def project(self, w2c: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to means [N,2] and covariances [N,2,2] in pixels, and depths [N]."""
        there = self.positions @ w2c[:3, :3].T + w2c[:3, 3]
        x, y, z = there.unbind(-1)
        z = z.clamp(min=0.01)
        (fx, _, cx), (_, fy, cy), _ = intrinsics.unbind(0)
        zero = torch.zeros_like(z)
        rows = torch.stack([fx / z, zero, -fx * x / z**2, zero, fy / z, -fy * y / z**2], dim=-1)
        to_pixels = rows.unflatten(-1, (2, 3)) @ w2c[:3, :3]  # the derivative of the projection
        covariance = to_pixels @ self.covariance() @ to_pixels.transpose(1, 2)
        covariance = covariance + 0.3 * torch.eye(2)  # a pixel is no point
        return torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1), covariance, there[:, 2]

    def render(self, w2c: Tensor, intrinsics: Tensor, size: int, background: float = 1.0) -> Tensor:
        """Render one view [3,size,size]; size is a multiple of 16."""
        means, covariance, depth = self.project(w2c, intrinsics)
        index = _tile_lists(means.detach(), covariance.detach(), depth.detach(), size)  # [tiles,K]
        conic = torch.linalg.inv(covariance)
        conic = torch.stack([conic[:, 0, 0], conic[:, 0, 1], conic[:, 1, 1]], dim=-1)
        table = torch.cat([means, conic, self.opacity.sigmoid()[:, None], 0.5 + _SH * self.f_dc], dim=1)
        table = torch.cat([table, torch.zeros(1, table.shape[1])])[index]  # [tiles,K,9], padded with opacity 0
        offset = torch.arange(TILE) + 0.5
        corner = torch.cartesian_prod(torch.arange(0, size, TILE), torch.arange(0, size, TILE))  # [tiles,2], y and x
        y, x = ((corner[:, axis, None, None] + torch.cartesian_prod(offset, offset)[:, axis, None]) for axis in (0, 1))
        dx, dy = x - table[:, None, :, 0], y - table[:, None, :, 1]  # [tiles,256,K]
        a, b, c = (table[:, None, :, column] for column in (2, 3, 4))
        alpha = table[:, None, :, 5] * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
        alpha = alpha.clamp(max=0.99)
        through = torch.cumprod(1 - alpha, dim=-1)
        before = torch.cat([torch.ones_like(through[..., :1]), through[..., :-1]], dim=-1)
        colour = (alpha * before) @ table[..., 6:] + through[..., -1:] * background  # [tiles,256,3]
        across = size // TILE
        return colour.view(across, across, TILE, TILE, 3).permute(4, 0, 2, 1, 3).reshape(3, size, size)

    def render_with_gsplat(self, w2c: Tensor, intrinsics: Tensor, size: int, background: float = 1.0) -> Tensor:
        """Render one view [3,size,size] with gsplat's kernels, on CUDA."""
        from gsplat import rasterization

        pictures, _, _ = rasterization(
            self.positions,
            F.normalize(self.rotation, dim=-1),
            self.scale.exp(),
            self.opacity.sigmoid(),
            0.5 + _SH * self.f_dc,
            w2c[None],
            intrinsics[None],
            size,
            size,
            backgrounds=torch.full((1, 3), background, device=w2c.device),
        )
        return pictures[0].permute(2, 0, 1)

    @torch.no_grad()
    def save(self, path) -> None:
        """Write the .ply file that viewers of 3DGS read."""
        columns = {name: self.positions[:, axis] for axis, name in enumerate("xyz")}
        columns |= {f"n{name}": torch.zeros(len(self.positions)) for name in "xyz"}
        columns |= {f"f_dc_{channel}": self.f_dc[:, channel] for channel in range(3)}
        columns |= {"opacity": self.opacity}
        columns |= {f"scale_{axis}": self.scale[:, axis] for axis in range(3)}
        columns |= {f"rot_{part}": F.normalize(self.rotation, dim=-1)[:, part] for part in range(4)}
        rows = np.empty(len(self.positions), [(name, "<f4") for name in columns])
        for name, column in columns.items():
            rows[name] = column.cpu().numpy()
        PlyData([PlyElement.describe(rows, "vertex")]).write(str(path))


def _tile_lists(means: Tensor, covariance: Tensor, depth: Tensor, size: int) -> Tensor:
    """List the Gaussians that reach each tile, from near to far: [tiles,K], padded with N."""
    half_trace = covariance.diagonal(dim1=1, dim2=2).sum(-1) / 2
    radius = 3 * (half_trace + (half_trace**2 - torch.linalg.det(covariance)).clamp(min=0).sqrt()).sqrt()
    order = depth.argsort()
    corner = torch.cartesian_prod(torch.arange(0, size, TILE), torch.arange(0, size, TILE)).flip(-1)  # x and y
    low, high = means[order] - radius[order, None], means[order] + radius[order, None]
    reaches = (high[None] > corner[:, None]).all(-1) & (low[None] < corner[:, None] + TILE).all(-1)
    reaches &= depth[order] > 0.01
    longest = max(1, int(reaches.sum(1).max()))
    index = torch.full((len(corner), longest), len(means))
    tile, rank = reaches.nonzero(as_tuple=True)
    index[tile, (reaches.cumsum(1) - 1)[tile, rank]] = order[rank]
    return index


def read_points(path) -> tuple[Tensor, Tensor]:
    """Read positions [N,3] and colours [N,3] in [0,1] of points3d.ply."""
    vertex = PlyData.read(str(path))["vertex"]
    positions = np.stack([vertex[name] for name in ("x", "y", "z")], axis=1)
    colours = np.stack([vertex[name] for name in ("red", "green", "blue")], axis=1)
    return torch.from_numpy(positions).float(), torch.from_numpy(colours).float() / 255
