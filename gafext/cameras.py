"""Cameras: poses, orbits, and conversion between the OpenCV and OpenGL conventions."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gafext.errors import CameraError

DEFAULT_FOV = 30.0
_POSE_SIZES = {12: 3, 16: 4}  # numbers per pose: rows of the w2c matrix


@dataclass(frozen=True, eq=False)
class Cameras:
    """Set of V square pinhole cameras with a common field of view.

    Args:
        w2c: [V,4,4] or [V,3,4] rigid world-to-camera matrices, x_camera = w2c @ x_world, with OpenCV camera
            axes (x right, y down, z forward); tensor, array or nested list, kept as float32 on the CPU.
        fov: horizontal field of view in degrees, 0 < fov < 180.

    Raises:
        CameraError: a matrix is not a rigid transform; the message names the view and the fault.
        ValueError: the field of view is out of range.
    """

    w2c: Tensor
    fov: float

    def __init__(self, w2c: Tensor | np.ndarray | Sequence, fov: float):
        object.__setattr__(self, "w2c", _rigid(w2c))
        object.__setattr__(self, "fov", _between("fov", fov, 0, 180))

    def __len__(self) -> int:
        return len(self.w2c)

    def __getitem__(self, index: int | slice) -> Tensor | Cameras:
        """Return the w2c matrix [4,4] of one view, or the `Cameras` of a slice of views."""
        return Cameras(self.w2c[index], self.fov) if isinstance(index, slice) else self.w2c[index]

    @property
    def c2w(self) -> Tensor:
        """Camera-to-world matrices [V,4,4], OpenCV camera axes."""
        return torch.linalg.inv(self.w2c.double()).float()

    @property
    def opengl_c2w(self) -> Tensor:
        """Camera-to-world matrices [V,4,4], OpenGL camera axes (x right, y up, z backward), same world."""
        return self.c2w * torch.tensor([1.0, -1.0, -1.0, 1.0], device="cpu")

    @property
    def camera_angle_x(self) -> float:
        """Horizontal field of view in radians."""
        return math.radians(self.fov)

    def focal(self, size: int) -> float:
        """Focal length in pixels of a `size` x `size` image: size / (2 tan(fov / 2))."""
        return size / (2 * math.tan(self.camera_angle_x / 2))

    def intrinsics(self, size: int) -> Tensor:
        """Intrinsic matrices [V,3,3] in pixels; pixel (i, j) has its centre at (i + 0.5, j + 0.5)."""
        focal, centre = self.focal(size), size / 2
        matrix = torch.tensor([[focal, 0, centre], [0, focal, centre], [0, 0, 1]], device="cpu")
        return matrix.repeat(len(self), 1, 1)  # [V,3,3]

    def pose(self, dim: int) -> Tensor:
        """Return the input of the U-Net's pose MLP: the first rows of each w2c matrix, flattened row by row.

        Args:
            dim: 12 (3 x 4 matrix) or 16 (4 x 4 matrix), the checkpoint's `pose_dim`.

        Returns:
            [V,dim] float32.

        Raises:
            CameraError: `dim` is neither 12 nor 16.
        """
        if dim not in _POSE_SIZES:
            raise CameraError(f"pose: expected 12 (w2c, 3 x 4) or 16 (w2c, 4 x 4) numbers per camera, got {dim}")
        return self.w2c[:, : _POSE_SIZES[dim]].flatten(1)


def orbit(
    num_views: int,
    elevation: float = 0.0,
    radius: float = 4.0,
    fov: float = DEFAULT_FOV,
    *,
    azimuth_start: float = 0.0,
    azimuth_span: float = 360.0,
) -> Cameras:
    """Create cameras on a circle around the head, all looking at the origin.

    azimuth_i = azimuth_start + i * azimuth_span / num_views. World: y up, the face looks along +z; azimuth 0
    is in front of the face and azimuth 90 at the subject's left (+x).

    Args:
        num_views: number of cameras, at least 1.
        elevation: degrees above the horizon, -90 < elevation < 90.
        radius: distance to the origin in world units, above 0.
        fov: horizontal field of view in degrees, 0 < fov < 180.
        azimuth_start: azimuth of view 0 in degrees.
        azimuth_span: degrees that the views divide evenly; 360 is a full circle.

    Raises:
        ValueError: an argument is out of range or NaN.
    """
    num_views = _at_least_one("num_views", num_views)
    elevation = math.radians(_between("elevation", elevation, -90, 90))
    radius = _between("radius", radius, 0, math.inf)
    start = _between("azimuth_start", azimuth_start, -math.inf, math.inf)
    span = _between("azimuth_span", azimuth_span, -math.inf, math.inf)
    steps = torch.arange(num_views, dtype=torch.float64, device="cpu") / num_views
    azimuth = torch.deg2rad(start + span * steps)
    horizontal = math.cos(elevation)
    height = torch.full_like(azimuth, math.sin(elevation))
    positions = torch.stack([azimuth.sin() * horizontal, height, azimuth.cos() * horizontal], dim=-1)
    return Cameras(look_at_origin(radius * positions), fov)


def look_at_origin(positions: Tensor) -> Tensor:
    """Compute world-to-camera matrices [V,4,4] of upright cameras at `positions` [V,3] that look at the origin."""
    forward = torch.nn.functional.normalize(-positions, dim=-1)
    up = torch.tensor([0.0, 1.0, 0.0], dtype=positions.dtype, device=positions.device).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    w2c = torch.eye(4, dtype=positions.dtype, device=positions.device).repeat(len(positions), 1, 1)
    w2c[:, :3, :3] = torch.stack([right, down, forward], dim=1)
    w2c[:, :3, 3:] = -w2c[:, :3, :3] @ positions[:, :, None]
    return w2c


def read_transforms(path: str | Path) -> Cameras:
    """Read the cameras of a transforms_train.json, as `MultiViewOutput.save` and NeRF trainers write it.

    Args:
        path: a JSON file with `camera_angle_x` in radians and `frames`, each with a `transform_matrix`: 4 x 4
            camera-to-world with OpenGL axes.

    Raises:
        CameraError: the file cannot be read, lacks a field, or has a matrix that is not a rigid transform.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        fov = math.degrees(values["camera_angle_x"])
        c2w = [frame["transform_matrix"] for frame in values["frames"]]
        opengl = Cameras(c2w, fov).w2c.double() * torch.tensor([1.0, -1.0, -1.0, 1.0], device="cpu")
        return Cameras(torch.linalg.inv(opengl), fov)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CameraError(f"{path}: not readable as cameras ({type(error).__name__}: {error})") from None


def as_cameras(
    cameras: Cameras | Tensor | np.ndarray | Sequence | None, *, num_views: int, fov: float = DEFAULT_FOV
) -> Cameras:
    """Convert any accepted form of cameras to `Cameras`.

    Args:
        cameras: Cameras; or [V,4,4] or [V,3,4] world-to-camera matrices with OpenCV axes as a tensor, array
            or nested list; or None for `orbit(num_views)`.
        num_views: number of cameras on the orbit; ignored when `cameras` is given.
        fov: horizontal field of view in degrees; ignored for `Cameras`, which have their own.

    Raises:
        CameraError: a matrix is not a rigid transform; the message names the view and the fault.
        ValueError: `num_views` or `fov` is out of range.
    """
    if cameras is None:
        return orbit(num_views, fov=fov)
    return cameras if isinstance(cameras, Cameras) else Cameras(cameras, fov)


def _rigid(matrices: Tensor | np.ndarray | Sequence) -> Tensor:
    """Validate rigid transforms and copy them to float32, [V,4,4]."""
    shape = list(matrices.shape) if isinstance(matrices, (Tensor, np.ndarray)) else None
    if not (hasattr(matrices, "__len__") and (shape is None or len(shape) == 3)) or len(matrices) == 0:
        got = type(matrices).__name__ if shape is None else f"shape {shape}"
        raise CameraError(f"cameras: expected at least one matrix, [V,4,4] or [V,3,4], got {got}")
    return torch.stack([_rigid_matrix(matrix, f"camera {view}") for view, matrix in enumerate(matrices)])


def _rigid_matrix(matrix: Tensor | np.ndarray | Sequence, name: str) -> Tensor:
    try:
        matrix = np.array(matrix) if isinstance(matrix, np.ndarray) else matrix  # torch warns of read-only arrays
        matrix = torch.as_tensor(matrix, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CameraError(f"{name}: expected a 4 x 4 or 3 x 4 matrix of numbers ({error})") from None
    if matrix.shape not in ((4, 4), (3, 4)):
        raise CameraError(f"{name}: expected a 4 x 4 or 3 x 4 matrix, got shape {list(matrix.shape)}")
    if not matrix.isfinite().all():
        raise CameraError(f"{name}: expected finite numbers, got NaN or infinity")
    last = torch.tensor([[0.0, 0.0, 0.0, 1.0]], device="cpu")
    if len(matrix) == 4 and not torch.allclose(matrix[3:], last, atol=1e-5):
        got = [round(value, 4) for value in matrix[3].tolist()]
        raise CameraError(f"{name}: expected the last row [0, 0, 0, 1], got {got}; is the matrix transposed?")
    rotation = matrix[:3, :3].double()
    error = (rotation.T @ rotation - torch.eye(3, dtype=torch.float64, device="cpu")).abs().max().item()
    if error > 1e-3:
        raise CameraError(f"{name}: expected a rotation, R^T R = I within 0.001, got an R that is off by {error:.3g}")
    if torch.linalg.det(rotation) < 0:
        raise CameraError(f"{name}: expected a rotation, det R = +1, got -1: one axis is mirrored")
    return torch.cat([matrix[:3], last])


def _between(name: str, value: float, low: float, high: float) -> float:
    """Convert `value` to a float and require low < value < high, which excludes NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None
    if not low < number < high:
        raise ValueError(f"{name}: expected {low:g} < {name} < {high:g}, got {number:g}")
    return number


def _at_least_one(name: str, value: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name}: expected >= 1, got {number}")
    return number
