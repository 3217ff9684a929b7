"""A set of cameras: poses and intrinsics, and their conversion between the OpenCV and OpenGL conventions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gafext.cameras.checks import between, pinhole, rigid
from gafext.cameras.tracking import Tracking
from gafext.errors import CameraError

DEFAULT_FOV = 30.0
_POSE_SIZES = {12: 3, 16: 4}  # numbers per pose: rows of the w2c matrix
_OPENGL = (1.0, -1.0, -1.0, 1.0)  # OpenCV's camera axes in OpenGL's; the inverse is the same


@dataclass(frozen=True, eq=False)
class Cameras:
    """Set of V pinhole cameras of square pictures.

    Args:
        w2c: [V,4,4] or [V,3,4] rigid world-to-camera matrices, x_camera = w2c @ x_world, with OpenCV camera
            axes (x right, y down, z forward); tensor, array or nested list, kept as float32 on the CPU.
        fov: horizontal and vertical field of view of all cameras in degrees, 0 < fov < 180.
        intrinsics: in place of `fov`, [3,3] or [V,3,3] in pixels, without skew; pixel (i, j) has its centre at
            (i + 0.5, j + 0.5).
        size: side in pixels of the pictures that `intrinsics` are for.
        tracking: what `read_transforms` found beside the cameras, for `MultiViewOutput.save`.

    Raises:
        CameraError: a matrix is not a rigid transform, or one of intrinsics is not a pinhole camera's; the message
            names the view and the fault. Or `tracking` has another number of frames.
        ValueError: the field of view is out of range, or not exactly one of `fov` and `intrinsics` is given.
    """

    w2c: Tensor
    _fov: float | None
    tracking: Tracking | None
    _lenses: Tensor | None  # intrinsics of pictures of side 1, [V,3,3] float64; None with a common field of view

    def __init__(
        self,
        w2c: Tensor | np.ndarray | Sequence,
        fov: float | None = None,
        *,
        intrinsics: Tensor | np.ndarray | Sequence | None = None,
        size: float | None = None,
        tracking: Tracking | None = None,
    ):
        object.__setattr__(self, "w2c", rigid(w2c))
        if tracking is not None and len(tracking.frames) != len(self.w2c):
            raise CameraError(f"tracking: expected {len(self.w2c)} frames, one per camera, got {len(tracking.frames)}")
        object.__setattr__(self, "tracking", tracking)
        lenses = None
        if fov is not None and intrinsics is None and size is None:
            fov = between("fov", fov, 0, 180)
        elif fov is None and intrinsics is not None and size is not None:
            lenses = pinhole(intrinsics, between("size", size, 0, math.inf), len(self.w2c))
            fov = _common_fov(lenses)
        else:
            raise ValueError("cameras: expected fov, or intrinsics and size")
        object.__setattr__(self, "_fov", fov)
        object.__setattr__(self, "_lenses", lenses if fov is None else None)

    def __len__(self) -> int:
        return len(self.w2c)

    def __getitem__(self, index: int | slice) -> Tensor | Cameras:
        """Return the w2c matrix [4,4] of one view, or the `Cameras` of a slice of views."""
        if not isinstance(index, slice):
            return self.w2c[index]
        return self.with_poses(self.w2c[list(range(len(self))[index])], index)  # tensors take no negative step

    def with_poses(self, w2c: Tensor, views: slice = slice(None)) -> Cameras:
        """Return cameras at other poses [V,4,4] with the intrinsics of `views`."""
        tracking = None if self.tracking is None else self.tracking[views]
        if self._lenses is None:
            return Cameras(w2c, self._fov, tracking=tracking)
        lenses = self._lenses[list(range(len(self))[views])]
        return Cameras(w2c, intrinsics=lenses, size=1, tracking=tracking)

    @property
    def c2w(self) -> Tensor:
        """Camera-to-world matrices [V,4,4], OpenCV camera axes."""
        return torch.linalg.inv(self.w2c.double()).float()

    @property
    def opengl_c2w(self) -> Tensor:
        """Camera-to-world matrices [V,4,4], OpenGL camera axes (x right, y up, z backward), same world."""
        return self.c2w * torch.tensor(_OPENGL, device="cpu")

    @property
    def has_fov(self) -> bool:
        """All cameras have one field of view, and the principal point in the middle of the picture."""
        return self._fov is not None

    @property
    def fov(self) -> float:
        """Horizontal field of view in degrees.

        Raises:
            CameraError: `has_fov` is False.
        """
        if self._fov is None:
            raise CameraError("cameras: expected one field of view and principal points in the middle, got others")
        return self._fov

    @property
    def camera_angle_x(self) -> float:
        """Horizontal field of view in radians; raises as `fov` does."""
        return math.radians(self.fov)

    def focal(self, size: int) -> float:
        """Focal length in pixels of a `size` x `size` image, size / (2 tan(fov / 2)); raises as `fov` does."""
        return size / (2 * math.tan(self.camera_angle_x / 2))

    def intrinsics(self, size: int) -> Tensor:
        """Intrinsic matrices [V,3,3] in pixels; pixel (i, j) has its centre at (i + 0.5, j + 0.5)."""
        if self._lenses is not None:
            return (self._lenses * torch.tensor([[size], [size], [1.0]], device="cpu")).float()
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


def _common_fov(lenses: Tensor) -> float | None:
    """Return the field of view in degrees of intrinsics [V,3,3] of side 1, if all are equal and centred; else None."""
    focal = lenses[0, 0, 0]
    centred = torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]], dtype=torch.float64, device="cpu")
    if not torch.allclose(lenses, centred.expand_as(lenses), rtol=0, atol=1e-7):
        return None
    return math.degrees(2 * math.atan(0.5 / focal.item()))
