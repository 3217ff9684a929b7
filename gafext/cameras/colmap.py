"""COLMAP's text files of cameras and images.

Source: COLMAP's documentation, "Output Format"; the intrinsics are those of src/colmap/sensor/models.h.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from gafext.errors import CameraError

_PARAMETERS = {
    "SIMPLE_PINHOLE": ("fl", "cx", "cy"),
    "PINHOLE": ("fl_x", "fl_y", "cx", "cy"),
    "SIMPLE_RADIAL": ("fl", "cx", "cy", "k1"),
    "RADIAL": ("fl", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "p1", "p2"),
}


def read_colmap(folder: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Read cameras.txt and images.txt.

    Returns:
        World-to-camera matrices [V,4,4] with OpenCV axes, in the order of the names of the pictures, and the intrinsics
        of each by the names that nerfstudio gives them.

    Raises:
        CameraError: a camera is of a model that is not a pinhole camera's, or a line lacks something.
        OSError, ValueError, KeyError: a file is missing or not of this form.
    """
    cameras = {}
    for line in filter(str.strip, _lines(folder / "cameras.txt")):
        number, model, width, height, *parameters = line.split()
        if model not in _PARAMETERS:
            raise CameraError(f"camera {number}: expected one of {', '.join(_PARAMETERS)}, got {model}")
        if len(parameters) != len(_PARAMETERS[model]):
            expected = " ".join(_PARAMETERS[model])
            raise CameraError(
                f"camera {number}: expected {expected} of a {model}, got {' '.join(parameters) or 'none'}"
            )
        values = dict(zip(_PARAMETERS[model], map(float, parameters), strict=True))
        focal = {"fl_x": values["fl"], "fl_y": values["fl"]} if "fl" in values else {}
        cameras[number] = {"camera_model": model, "w": int(width), "h": int(height), **values, **focal}
    images = []
    lines = _lines(folder / "images.txt")
    for points in lines[1::2]:
        parts = points.split()
        if len(parts) % 3 or not all(re.fullmatch(r"-?\d+(\.0*)?", part) for part in parts[2::3]):
            raise CameraError(f"images.txt: expected a line of points (x, y, id) below each image's, got {points!r}")
    for line in filter(str.strip, lines[::2]):
        fields = line.split(maxsplit=9)
        if len(fields) != 10 or fields[8] not in cameras:
            raise CameraError(
                f"images.txt: expected an id, 7 numbers of a pose, a camera's id and a name, got {line!r}"
            )
        _, *pose, camera, name = fields
        images.append((name, _matrix(*map(float, pose)), cameras[camera]))
    if not images:
        raise CameraError("images.txt: expected at least one image, got none")
    images.sort(key=lambda image: image[0])
    return np.stack([matrix for _, matrix, _ in images]), [values for _, _, values in images]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if not line.startswith("#")]


def _matrix(qw: float, qx: float, qy: float, qz: float, tx: float, ty: float, tz: float) -> np.ndarray:
    w, x, y, z = np.array([qw, qx, qy, qz]) / np.linalg.norm([qw, qx, qy, qz])
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), tx],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x), ty],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y), tz],
            [0, 0, 0, 1],
        ]
    )


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """Convert a rotation matrix [3,3] to COLMAP's unit quaternion (w, x, y, z), w >= 0."""
    xx, yx, zx, xy, yy, zy, xz, yz, zz = np.asarray(rotation, dtype=np.float64).flat
    symmetric = np.array(
        [
            [xx - yy - zz, 0, 0, 0],
            [yx + xy, yy - xx - zz, 0, 0],
            [zx + xz, zy + yz, zz - xx - yy, 0],
            [yz - zy, zx - xz, xy - yx, xx + yy + zz],
        ]
    )
    values, vectors = np.linalg.eigh(symmetric / 3)
    w = vectors[[3, 0, 1, 2], np.argmax(values)]
    return w if w[0] >= 0 else -w
