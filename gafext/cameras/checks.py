"""Validation of matrices and numbers."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gafext.errors import CameraError


def rigid(matrices: Tensor | np.ndarray | Sequence) -> Tensor:
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


def pinhole(intrinsics: Tensor | np.ndarray | Sequence, size: float, views: int) -> Tensor:
    """Validate intrinsics in pixels, [3,3] or [V,3,3], and scale them to pictures of side 1: [V,3,3] float64."""
    try:
        intrinsics = np.array(intrinsics) if isinstance(intrinsics, np.ndarray) else intrinsics
        matrices = torch.as_tensor(intrinsics, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise CameraError(f"intrinsics: expected 3 x 3 matrices of numbers ({error})") from None
    if matrices.shape not in ((3, 3), (views, 3, 3)):
        raise CameraError(f"intrinsics: expected [3,3] or [{views},3,3], got {list(matrices.shape)}")
    matrices = matrices.expand(views, 3, 3)
    for view, matrix in enumerate(matrices):
        (fx, skew, _), (zero, fy, _), last = matrix.tolist()
        if not matrix.isfinite().all():
            raise CameraError(f"intrinsics {view}: expected finite numbers, got {matrix.tolist()}")
        if fx <= 0 or fy <= 0:
            raise CameraError(f"intrinsics {view}: expected positive focal lengths, got {fx:g} and {fy:g}")
        if skew != 0 or zero != 0 or last != [0, 0, 1]:
            raise CameraError(
                f"intrinsics {view}: expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], got {matrix.tolist()}"
            )
    return matrices / torch.tensor([[size], [size], [1.0]], dtype=torch.float64, device="cpu")


def between(name: str, value: float, low: float, high: float) -> float:
    """Convert `value` to a float and require low < value < high, which excludes NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None
    if not low < number < high:
        raise ValueError(f"{name}: expected {low:g} < {name} < {high:g}, got {number:g}")
    return number


MOST_VIEWS = 100_000  # so that what is far too much is said by the estimate of memory, and not by the system


def view_count(value: int) -> int:
    """Convert a number of views to an int, and require 1 to MOST_VIEWS."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"num_views: expected a whole number >= 1, got {value!r}") from None
    if number < 1:
        raise ValueError(f"num_views: expected >= 1, got {number}")
    if number > MOST_VIEWS:
        raise ValueError(f"num_views: expected at most {MOST_VIEWS}, got {number}")
    return number
