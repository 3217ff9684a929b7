"""Camera files of other programs: nerfstudio, Blender, 3DGS, VHAP, FaceLift, COLMAP, and bare matrices."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gafext.cameras.cameras import Cameras
from gafext.cameras.checks import between
from gafext.cameras.colmap import read_colmap
from gafext.cameras.tracking import Tracking
from gafext.errors import CameraError

_AXES = {"opencv": (1, 1, 1, 1), "opengl": (1, -1, -1, 1), "blender": (1, -1, -1, 1)}
CONVENTIONS = tuple(f"{axes}-{direction}" for axes in _AXES for direction in ("w2c", "c2w"))
"""Names for `read_transforms`: axes of the camera, and direction of the matrix. Blender's camera has OpenGL's axes."""

_DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2", "distortion", "distortion_params", "is_fisheye")
_FOCAL = ("fl_x", "fx", "fl_y", "fy", "camera_angle_y")  # the file's give way to a frame's camera_angle_x
_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL", "perspective")  # without distortion, equal
_FILES = ("transforms.json", "transforms_train.json", "opencv_cameras.json")
_UNREADABLE = (OSError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError, EOFError, AttributeError)
_UNREADABLE += (zipfile.BadZipFile, zlib.error)


class Lens(NamedTuple):
    """Intrinsics of one square picture."""

    focal: tuple[float, float]  # pixels
    centre: tuple[float, float]  # pixels
    size: float  # pixels; 1 where the file has an angle and no size

    def matrix(self) -> list[list[float]]:
        """Intrinsics of a picture of side 1, [3][3]."""
        (fx, fy), (cx, cy) = self.focal, self.centre
        return [[fx / self.size, 0, cx / self.size], [0, fy / self.size, cy / self.size], [0, 0, 1]]


def read_transforms(
    path: str | Path, *, convention: str | None = None, fov: float | None = None, pad: bool = False
) -> Cameras:
    """Read cameras from a file or folder that another program wrote.

    - JSON with `frames` of camera-to-world matrices `transform_matrix`, OpenGL axes: nerfstudio's transforms.json
      (`fl_x`, `cx`, `w`, ... of all frames or per frame; `applied_transform` and `applied_scale` are undone), Blender's
      and 3DGS's transforms_train.json (`camera_angle_x`, `camera_angle_y`), VHAP's and `MultiViewOutput.save`'s.
      `Cameras.tracking` keeps VHAP's `flame_param_path`, timesteps and names of cameras.
    - JSON with `frames` of `w2c` and `fx`, `fy`, `cx`, `cy`, `w`, `h`: FaceLift's opencv_cameras.json.
    - A folder with COLMAP's cameras.txt and images.txt, or that has them in sparse/0: views in the order of their
      pictures' names. A folder with one of the JSON files above.
    - .npz with `w2c` or `c2w` [V,4,4] or [V,3,4], and `intrinsics` [3,3] or [V,3,3] with `size`, or `fov` in degrees;
      .npy of matrices alone. Both need `convention`, unless `w2c` of the .npz has OpenCV axes.

    Args:
        path: the file or folder.
        convention: one of `CONVENTIONS`, for bare matrices alone: other files have one.
        fov: horizontal field of view in degrees, for a file without intrinsics and without one.
        pad: of pictures in a JSON file that are not square, return the cameras after padding both sides to a square.

    Returns:
        The cameras, in the world of the file.

    Raises:
        CameraError: the file cannot be read, lacks a field, has a matrix that is not a rigid transform, describes
            pictures that are distorted or not square, or has the convention or the field of view that is given.
    """
    path = Path(path)
    try:
        if path.suffix.lower() in (".npz", ".npy") and not path.is_dir():
            return _read_matrices(path, convention, fov)
        if path.is_dir():
            _refuse("convention", convention)
            return _read_folder(path, pad, fov)
        values = _read_json(path)
        if isinstance(values, list):
            return _read_bare(values, convention, fov)
        _refuse("convention", convention)
        return _read_frames(values, path.parent, pad, fov)
    except CameraError as error:
        raise CameraError(f"{path}: {error}") from None
    except _UNREADABLE as error:
        raise CameraError(f"{path}: not readable as cameras ({type(error).__name__}: {error})") from None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark


def _read_frames(values: Mapping[str, Any], folder: Path, pad: bool, fov: float | None) -> Cameras:
    frames = values["frames"]
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise CameraError(f"frames: expected a list of objects, got {str(frames)[:40]}")
    if not frames:
        raise CameraError("frames: expected at least one, got none")
    merged = [_merged(values, frame) for frame in frames]
    if any(_has_focal(frame) for frame in merged):
        _refuse("fov", fov)
    elif fov is not None:
        angle = math.radians(between("fov", fov, 0, 180))
        merged = [{**frame, "camera_angle_x": angle} for frame in merged]
    lenses = [_lens(frame, view, pad) for view, frame in enumerate(merged)]
    if all("w2c" in frame for frame in frames):
        return _cameras(np.array([frame["w2c"] for frame in frames], dtype=np.float64), "opencv-w2c", lenses)
    if lacking := [view for view, frame in enumerate(frames) if "transform_matrix" not in frame]:
        raise CameraError(f"frame {lacking[0]}: expected transform_matrix, or w2c in all frames, got neither")
    c2w = _square(np.array([frame["transform_matrix"] for frame in frames], dtype=np.float64))
    if values.get("applied_scale") is not None:
        c2w[:, :3, 3] /= between("applied_scale", values["applied_scale"], 0, math.inf)
    if values.get("applied_transform") is not None:
        applied = np.vstack([np.array(values["applied_transform"], dtype=np.float64)[:3], [0, 0, 0, 1]])
        c2w = np.linalg.inv(applied) @ c2w
    return _cameras(c2w, "opengl-c2w", lenses, Tracking.of(folder, frames))


def _merged(values: Mapping[str, Any], frame: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a frame and of its file, of which its own go first; null is no value."""
    own = {name: value for name, value in frame.items() if value is not None}
    shared = {name: value for name, value in values.items() if value is not None}
    if "camera_angle_x" in own:
        shared = {name: value for name, value in shared.items() if name not in _FOCAL}
    return {**shared, **own}


def _has_focal(values: Mapping[str, Any]) -> bool:
    return not values.keys().isdisjoint((*_FOCAL, "camera_angle_x"))


def _lens(values: Mapping[str, Any], view: int, pad: bool = False) -> Lens:
    """Read the intrinsics of a frame."""
    for name in _DISTORTION:
        value = values.get(name, 0)
        if np.any(np.asarray(0 if value is None else value, dtype=np.float64) != 0):
            raise CameraError(f"frame {view}: expected no distortion, got {name}={value}; undistort the pictures first")
    model = values.get("camera_model", "PINHOLE")
    if model not in _MODELS:
        raise CameraError(f"frame {view}: expected a pinhole camera, got camera_model {model!r}")
    focal = values.get("fl_x", values.get("fx"))
    width, height = values.get("w"), values.get("h")
    if None not in (width, height) and width != height and not pad:
        raise CameraError(f"frame {view}: expected square pictures, got {width} x {height}; crop or pad them first")
    if any(side is not None and not side > 0 for side in (width, height)):
        raise CameraError(f"frame {view}: expected positive w and h, got {width} x {height}")
    size = width or height
    if focal is None:
        angle = values.get("camera_angle_x", values.get("camera_angle_y"))
        if angle is None:
            raise CameraError(f"frame {view}: expected fl_x, fx or camera_angle_x, or a field of view (fov), got none")
        if not 0 < angle < math.pi:
            raise CameraError(f"frame {view}: expected 0 < camera_angle_x < pi radians, got {angle:g}")
        if size is None and not values.keys().isdisjoint(("cx", "cy")):
            raise CameraError(f"frame {view}: expected w and h beside cx and cy, got none")
        size = size or 1
        side = size if "camera_angle_x" in values else height or size
        focal = side / (2 * math.tan(angle / 2))
    if size is None:
        raise CameraError(f"frame {view}: expected w and h beside the focal length, got none")
    focal_y = values.get("fl_y", values.get("fy", _focal_of_angle_y(values, height or size)))
    width, height = width or size, height or size
    side = max(width, height)
    x, y = values.get("cx", width / 2), values.get("cy", height / 2)
    if "timestep_indices" in values:  # VHAP's, whose cy is from the bottom: its vhap/util/camera.py, opencv->opengl
        y = height - y
    centre = x + (side - width) / 2, y + (side - height) / 2
    return Lens((focal, focal if focal_y is None else focal_y), centre, side)


def _focal_of_angle_y(values: Mapping[str, Any], height: float) -> float | None:
    """Return what a vertical angle of view says where no focal length does."""
    angle = values.get("camera_angle_y")
    if angle is None or not values.keys().isdisjoint(("fl_x", "fx")):
        return None
    return height / (2 * math.tan(between("camera_angle_y", angle, 0, math.pi) / 2))


def _cameras(matrices: np.ndarray, convention: str, lenses: list[Lens], tracking: Tracking | None = None) -> Cameras:
    intrinsics = [lens.matrix() for lens in lenses]
    return Cameras(to_opencv(matrices, convention), intrinsics=intrinsics, size=1, tracking=tracking)


def to_opencv(matrices: np.ndarray, convention: str) -> np.ndarray:
    """Convert [V,4,4] or [V,3,4] matrices of one of `CONVENTIONS` to world-to-camera with OpenCV axes, [V,4,4]."""
    if convention not in CONVENTIONS:
        raise CameraError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}")
    axes, direction = convention.split("-")
    matrices = _square(np.asarray(matrices, dtype=np.float64))
    flip = np.array(_AXES[axes], dtype=np.float64)
    if direction == "w2c":
        return flip[:, None] * matrices
    # Checked before the inversion, which a singular matrix would not survive; the columns are the camera's axes.
    return np.linalg.inv(Cameras(matrices * flip, 1.0).w2c.double().numpy())


def _square(matrices: np.ndarray) -> np.ndarray:
    """Return [V,3,4] matrices as [V,4,4]; others as they are."""
    if matrices.ndim != 3 or matrices.shape[1:] != (3, 4):
        return matrices
    return np.concatenate([matrices, np.tile([[[0, 0, 0, 1.0]]], (len(matrices), 1, 1))], axis=1)


def _read_folder(folder: Path, pad: bool, fov: float | None) -> Cameras:
    binary = None
    for place in (folder, folder / "sparse" / "0", folder / "sparse"):
        if (place / "images.txt").is_file():
            _refuse("fov", fov)
            matrices, cameras = read_colmap(place)
            return _cameras(matrices, "opencv-w2c", [_lens(values, view, pad) for view, values in enumerate(cameras)])
        if (place / "images.bin").is_file():
            binary = binary or place
    for name in _FILES:
        if (folder / name).is_file():
            return _read_frames(_read_json(folder / name), folder, pad, fov)
    if binary is not None:
        raise CameraError(
            "expected COLMAP's text files, got images.bin; convert it: colmap model_converter --input_path "
            f"{binary} --output_path {binary} --output_type TXT"
        )
    raise CameraError(f"expected {', '.join(_FILES)} or COLMAP's images.txt in it, got none")


def _read_matrices(path: Path, convention: str | None, fov: float | None) -> Cameras:
    found = np.load(path, allow_pickle=False)
    arrays = {"": found} if isinstance(found, np.ndarray) else dict(found)
    names = [name for name in ("", "w2c", "c2w") if name in arrays]
    if len(names) != 1:
        raise CameraError(f"expected w2c or c2w, got {', '.join(names or arrays) or 'nothing'}")
    [name] = names
    if convention is None and name == "w2c":
        convention = "opencv-w2c"
    if convention is None or (name and not convention.endswith(name)):
        raise CameraError(f"expected the convention of the matrices, one of {', '.join(CONVENTIONS)}, got {convention}")
    w2c = to_opencv(arrays[name], convention)
    if "intrinsics" in arrays or "fov" in arrays:
        _refuse("fov", fov)
    if "intrinsics" in arrays:
        if "fov" in arrays:
            raise CameraError("expected intrinsics or fov, got both")
        if "size" not in arrays:
            raise CameraError("expected size, the side of the pictures in pixels, beside intrinsics, got none")
        return Cameras(w2c, intrinsics=arrays["intrinsics"], size=float(arrays["size"]))
    return Cameras(w2c, _known_fov(float(arrays["fov"]) if "fov" in arrays else fov))


def _read_bare(matrices: list, convention: str | None, fov: float | None) -> Cameras:
    if convention is None:
        raise CameraError(f"expected the convention of the matrices, one of {', '.join(CONVENTIONS)}, got none")
    return Cameras(to_opencv(np.array(matrices, dtype=np.float64), convention), _known_fov(fov))


def _refuse(name: str, value: object) -> None:
    if value is not None:
        raise CameraError(f"{name}: expected none beside the one that the file has, got {value}")


def _known_fov(fov: float | None) -> float:
    if fov is None:
        raise CameraError("expected a field of view (fov) with the matrices, got none")
    return fov
