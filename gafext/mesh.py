"""Normal maps of a mesh that was fitted to the portrait, such as FLAME's, for the cameras of a run.

trimesh reads the file, and Intel's Embree, through embreex, casts the rays: `pip install "gafext[mesh]"`.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gafext.cameras import Cameras
from gafext.errors import MeshError

_CREASE = 45.0  # degrees between faces beyond which an edge stays sharp, as in the smooth shading of modelling programs
_PAIRS_AT_ONCE = 2**20  # corners, each with every face around it
_LITTLE, _ALL = 0.03, 0.97  # shares of a picture that no head has; the neutral head on the default orbit has 0.37
HEAD_HEIGHT = 1.6  # of the neutral head with its neck, in world units; from chin to crown it is 1.3


class Surface(NamedTuple):
    """What V cameras see of a surface."""

    normals: Tensor  # [V,3,S,S] float32: n/2 + 1/2 in the viewer's axes (x right, y up, z to the viewer); else 0.5
    alpha: Tensor  # [V,1,S,S] in [0,1]
    depth: Tensor  # [V,1,S,S]: camera z of the nearest point, infinite on the background


class Mesh:
    """Triangles in world coordinates (y up, the face looks along +z).

    Args:
        vertices: [N,3] numbers.
        faces: [F,3] indices of vertices, counter-clockwise seen from outside.

    Raises:
        MeshError: there are no faces, an index has no vertex, or a number is not finite.
    """

    def __init__(self, vertices: Any, faces: Any):
        self.vertices = _rows_of_three("vertices", vertices, "fiu").astype(np.float64)
        self.faces = _rows_of_three("faces", faces, "iu").astype(np.int64)
        if len(self.faces) == 0:
            raise MeshError("mesh: expected triangles, got none")
        for index in (self.faces.min(), self.faces.max()):
            if not 0 <= index < len(self.vertices):
                raise MeshError(f"mesh: expected indices of {len(self.vertices)} vertices, got {index}")
        if not np.isfinite(self.vertices).all():
            raise MeshError("mesh: expected finite vertices, got NaN or infinity")
        self._corner_normals = self._smooth_normals()  # [F,3,3]

    def _smooth_normals(self) -> np.ndarray:
        """Average the normals of the faces around each corner, by area, leaving out those across a sharp edge."""
        first, second, third = self.vertices[self.faces].transpose(1, 0, 2)
        scaled = np.cross(second - first, third - first)  # of length twice the area
        unit = scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-30)
        vertex = self.faces.flatten()  # of every corner
        around = np.argsort(vertex, kind="stable") // 3  # the faces around vertex 0, then those around vertex 1, ...
        valence = np.bincount(vertex, minlength=len(self.vertices))
        first, count = (np.cumsum(valence) - valence)[vertex], valence[vertex]  # of each corner's in `around`
        ends, result = np.cumsum(count), np.empty((len(vertex), 3))
        start = 0
        while start < len(vertex):
            pairs = ends[start] - count[start] + _PAIRS_AT_ONCE
            stop = max(start + 1, int(np.searchsorted(ends, pairs, side="right")))
            counts = count[start:stop]
            begin = np.cumsum(counts) - counts
            corner = np.repeat(np.arange(start, stop), counts)
            neighbour = around[np.arange(len(corner)) + np.repeat(first[start:stop] - begin, counts)]
            smooth = (unit[neighbour] * unit[corner // 3]).sum(1) > np.cos(np.radians(_CREASE))
            result[start:stop] = np.add.reduceat(scaled[neighbour] * smooth[:, None], begin)
            start = stop
        return (result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-30)).reshape(-1, 3, 3)

    def render(self, cameras: Cameras, size: int, *, samples: int = 3) -> Surface:
        """Render normals, alpha and depth.

        A pixel has the normal and the depth at its centre, so that creases are not blended, and is blended with the
        background by its coverage.

        Args:
            cameras: V cameras.
            size: S, height and width in pixels.
            samples: rays per pixel along each axis, an odd number; coverage is the share of those that hit.

        Returns:
            The images, float32 on the CPU.

        Raises:
            ImportError: trimesh or embreex is not installed.
            ValueError: `size` is not above 0, or `samples` not odd and above 0.
        """
        if size < 1:
            raise ValueError(f"size: expected a number of pixels above 0, got {size}")
        if samples < 1 or samples % 2 == 0:
            raise ValueError(f"samples: expected an odd number, one of the rays goes through the centre, got {samples}")
        caster, lenses = _caster(self), cameras.intrinsics(size).double().numpy()
        views = []
        for view, lens in enumerate(lenses):
            normals, hit, depth = self._trace(caster, cameras.w2c[view].double().numpy(), lens, size, samples)
            order = np.argmax(np.where(np.arange(samples**2) == samples**2 // 2, 2, 1) * hit, axis=-1)[..., None]
            normals = np.take_along_axis(normals, order[..., None], axis=2)[:, :, 0]  # [S,S,3]
            alpha = hit.mean(-1)[..., None]
            normals = 0.5 + alpha * normals / 2
            views.append((normals, alpha, np.take_along_axis(depth, order, axis=-1)))
        return Surface(
            *(torch.from_numpy(np.stack(image)).float().permute(0, 3, 1, 2) for image in zip(*views, strict=True))
        )

    def normal_maps(self, cameras: Cameras, size: int) -> Tensor:
        """Render normal maps [V,3,size,size] as `render` does, of views that see the mesh.

        Raises:
            MeshError: a view sees nothing of the mesh.
            ImportError: trimesh or embreex is not installed.

        Warns:
            UserWarning: a view sees the mesh very small, or nothing else.
        """
        normals = self.render(cameras, size).normals
        if reason := unusual_coverage(normals):
            corners = self.vertices[self.faces].reshape(-1, 3)
            low, high = corners.min(0), corners.max(0)
            middle, extent = ((low + high) / 2).round(3).tolist(), (high - low).max()
            advice = (
                f"mesh: {reason}. It is {extent:.3g} units across with its middle at {middle}; the neutral head is "
                f"{HEAD_HEIGHT} high, its middle near the origin. Scale and move the mesh (--mesh-pose, pose=; a scale "
                f"of about {HEAD_HEIGHT / extent:.2g}), or choose other cameras (--cameras, --radius)"
            )
            if (normals == 0.5).flatten(1).all(1).any():
                raise MeshError(advice)
            warnings.warn(advice, stacklevel=2)
        return normals

    def _trace(self, caster: Any, w2c: np.ndarray, lens: np.ndarray, size: int, samples: int):
        """Cast n² rays per pixel of one view: unit normals [S,S,n²,3] of the viewer, hits and depths [S,S,n²]."""
        (fx, _, cx), (_, fy, cy), _ = lens
        places = (np.arange(size * samples) + 0.5) / samples
        y, x = np.meshgrid((places - cy) / fy, (places - cx) / fx, indexing="ij")
        rays = np.stack([x, y, np.ones_like(x)], axis=-1)  # in camera axes, z = 1
        rays = rays.reshape(size, samples, size, samples, 3).swapaxes(1, 2).reshape(-1, 3) @ w2c[:3, :3]
        eye = -w2c[:3, :3].T @ w2c[:3, 3]
        face = caster.intersects_first(np.broadcast_to(eye, rays.shape), rays)
        hit = face >= 0
        weights, distance = self._weights(face[hit], eye, rays[hit])
        normal = (self._corner_normals[face[hit]] * weights[..., None]).sum(1) @ w2c[:3, :3].T * [1, -1, -1]
        normals, depth = np.zeros((len(rays), 3)), np.full(len(rays), np.inf)
        normals[hit] = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
        depth[hit] = distance
        shape = (size, size, samples**2)
        return normals.reshape(*shape, 3), hit.reshape(shape), depth.reshape(shape)

    def _weights(self, face: np.ndarray, eye: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute barycentric weights [n,3] and distances [n] of where rays meet their faces.

        Source: Möller and Trumbore, "Fast, Minimum Storage Ray/Triangle Intersection" (1997).
        """
        first, second, third = self.vertices[self.faces[face]].transpose(1, 0, 2)
        along, across, from_first = second - first, third - first, eye - first
        p, q = np.cross(rays, across), np.cross(from_first, along)
        scale = 1 / (along * p).sum(1)
        u, v = (from_first * p).sum(1) * scale, (rays * q).sum(1) * scale
        weights = np.stack([1 - u - v, u, v], axis=1).clip(0, 1)  # Embree decides in float32
        return weights, (across * q).sum(1) * scale


def unusual_coverage(normals: Tensor) -> str:
    """Say which of the normal maps [V,3,S,S] shows almost nothing of a head, or nothing else; empty if none does."""
    for view, share in enumerate((normals != 0.5).any(1).float().mean((1, 2)).tolist()):
        if not _LITTLE <= share <= _ALL:
            return f"expected {_LITTLE:.0%} to {_ALL:.0%} of each picture covered, got {share:.1%} of view {view}"
    return ""


def load_mesh(path: str | Path, *, pose: Any = None) -> Mesh:
    """Read a mesh from a file of a format that trimesh reads: .obj, .ply, .glb, .stl, ...

    Args:
        path: the file; several objects become one.
        pose: [4,4] matrix from the file's coordinates to the world (y up, the face looks along +z): a rotation, a
            translation and a scale; None: they are the same.

    Returns:
        The mesh.

    Raises:
        MeshError: the file cannot be read or has no triangles, or the pose is not of this form.
        ImportError: trimesh is not installed.
    """
    trimesh = _trimesh()
    matrix = _similarity(np.eye(4) if pose is None else pose)
    try:
        if Path(path).suffix.lower() == ".obj":
            found = trimesh.load_mesh(_read_obj(Path(path)), file_type="obj", process=False)
        else:
            found = trimesh.load_mesh(str(path), process=False)
        found = found.to_mesh() if hasattr(found, "to_mesh") else found
        # Seams of a texture have their vertices twice, and would be edges.
        found.merge_vertices(merge_tex=True, merge_norm=True)
        vertices = np.asarray(found.vertices) @ matrix[:3, :3].T + matrix[:3, 3]
    except Exception as error:  # of trimesh, and of zipfile, struct, lxml and others that it reads some formats with
        raise MeshError(f"{path}: not readable as a mesh ({type(error).__name__}: {error})") from None
    try:
        return Mesh(vertices, found.faces)
    except MeshError as error:
        raise MeshError(f"{path}: {error}") from None


def _similarity(pose: Any) -> np.ndarray:
    try:
        matrix = np.asarray(pose, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MeshError(f"pose: expected a 4 x 4 matrix of numbers ({error})") from None
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.allclose(matrix[3], [0, 0, 0, 1]):
        raise MeshError(f"pose: expected a 4 x 4 matrix with the last row [0, 0, 0, 1], got {matrix.tolist()}")
    scale = np.cbrt(np.linalg.det(matrix[:3, :3]))
    if scale <= 0 or not np.allclose(matrix[:3, :3].T @ matrix[:3, :3], scale**2 * np.eye(3), atol=1e-3 * scale**2):
        raise MeshError("pose: expected a rotation with one scale for all axes, got another matrix")
    return matrix


def _rows_of_three(name: str, values: Any, kinds: str) -> np.ndarray:
    """Return an array [N,3] of numbers of one of some kinds of dtype; an empty one may have any shape and dtype."""
    rows = np.asarray(values)
    if rows.size == 0:
        return rows.reshape(0, 3)
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype.kind not in kinds:
        what = "numbers" if "f" in kinds else "whole numbers"
        raise MeshError(f"mesh: expected {name} [N,3] of {what}, got {list(rows.shape)} of {rows.dtype}")
    return rows


def _read_obj(path: Path) -> io.StringIO:
    """Read an OBJ file, its relative indices made absolute: trimesh takes them to count from the end of the file."""
    counts, lines = {"v": 0, "vt": 0, "vn": 0}, []

    def absolute(corner: str) -> str:
        parts = zip(corner.split("/"), counts.values(), strict=False)
        return "/".join(str(count + 1 + int(index)) if index.startswith("-") else index for index, count in parts)

    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        kind, *values = line.split() or [""]
        if kind in counts:
            counts[kind] += 1
        elif kind == "f" and "-" in line:
            line = " ".join([kind, *map(absolute, values)])
        lines.append(line)
    return io.StringIO("\n".join(lines) + "\n")


def _trimesh() -> Any:
    try:
        import trimesh
    except ImportError:
        raise ImportError('a mesh needs trimesh and embreex: pip install "gafext[mesh]"') from None
    return trimesh


def _caster(mesh: Mesh) -> Any:
    trimesh = _trimesh()
    try:
        from trimesh.ray.ray_pyembree import RayMeshIntersector
    except ImportError:
        raise ImportError('a mesh needs trimesh and embreex: pip install "gafext[mesh]"') from None
    return RayMeshIntersector(trimesh.Trimesh(mesh.vertices, mesh.faces, process=False))
