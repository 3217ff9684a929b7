"""Camera files of the programs that read the views.

| name | files | read by |
|---|---|---|
| 3dgs | transforms_{train,test,val}.json, points3d.ply | 3D Gaussian Splatting, GaussianAvatars, blender-data |
| nerfstudio | transforms.json, points3d.ply | nerfstudio, Brush |
| colmap | sparse/0/*.txt, images/ | gsplat's examples, COLMAP, 3DGS |
| facelift | opencv_cameras.json | FaceLift's reconstruction |
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gafext.cameras import Cameras
from gafext.cameras.colmap import quaternion
from gafext.output.points import Points, write_ply
from gafext.weights import write_json

POINTS = "points3d.ply"


class Scene(NamedTuple):
    """Views that are written already, and what describes them."""

    names: list[str]  # of the pictures, with extension
    cameras: Cameras
    size: int  # of the pictures, in pixels
    points: Points
    masks: list[str]  # of the alpha channels, or none


def _write_3dgs(folder: Path, scene: Scene) -> None:
    content = splatting_transforms(scene.cameras, scene.size, scene.names)
    # Without evaluation 3DGS trains on the test views too: with all of them there, every view counts alike.
    for split in ("train", "test", "val"):
        write_json(folder / f"transforms_{split}.json", content)
    _write_points(folder, scene)
    if scene.cameras.tracking is not None:
        scene.cameras.tracking.copy_flame_files(folder)


def splatting_transforms(cameras: Cameras, size: int, names: list[str]) -> dict[str, Any]:
    """Return the content of transforms_train.json: names without extension, as 3DGS adds ".png" to every name.

    Args:
        cameras: V cameras with a common field of view, written as OpenGL camera-to-world matrices; their `tracking`
            replaces the timestep 0 and the number of the camera.
        size: side of the pictures in pixels.
        names: file names of the pictures.
    """
    known = ({},) * len(cameras) if cameras.tracking is None else cameras.tracking.frames
    frames = [
        {
            "file_path": Path(name).stem,
            "timestep_index": 0,
            "camera_index": view,
            "camera_id": str(view),  # without it GaussianAvatars does not read the index
            "w": size,  # without a size per frame, GaussianAvatars opens every image file
            "h": size,
            "transform_matrix": matrix,
            **fields,
        }
        for view, (name, matrix, fields) in enumerate(zip(names, cameras.opengl_c2w.tolist(), known, strict=True))
    ]
    return {"camera_angle_x": cameras.camera_angle_x, **_lens(cameras, size, 0), "frames": frames}


def _write_nerfstudio(folder: Path, scene: Scene) -> None:
    frames = []
    for view, (name, matrix) in enumerate(zip(scene.names, scene.cameras.opengl_c2w.tolist(), strict=True)):
        mask = {"mask_path": scene.masks[view]} if scene.masks else {}
        lens = {} if scene.cameras.has_fov else _lens(scene.cameras, scene.size, view)
        tracked = {} if scene.cameras.tracking is None else scene.cameras.tracking.frames[view]
        if not (folder / "flame_param").is_dir():  # which "3dgs", written before, brings
            tracked = {key: value for key, value in tracked.items() if key != "flame_param_path"}
        frames.append({"file_path": name, **mask, **lens, "transform_matrix": matrix, **tracked})
    # Of a lens at the file's level nerfstudio takes no frame's, so it is there only if all have it.
    shared = _lens(scene.cameras, scene.size, 0) if scene.cameras.has_fov else {}
    # No camera_model: Brush does not know "PINHOLE", and nerfstudio's default is one without distortion here.
    points = {"ply_file_path": POINTS} if _write_points(folder, scene) else {}
    write_json(folder / "transforms.json", {**shared, **points, "frames": frames})


def _write_points(folder: Path, scene: Scene) -> bool:
    """Write the points, which two formats share; none if there are none: without the file 3DGS draws its own."""
    if len(scene.points.positions) and not (folder / POINTS).exists():
        write_ply(folder / POINTS, scene.points)
    return len(scene.points.positions) > 0


def _write_colmap(folder: Path, scene: Scene) -> None:
    (folder / "images").mkdir()
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    cameras = ["# CAMERA_ID, MODEL, WIDTH, HEIGHT, fx, fy, cx, cy"]
    images = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME; then a line of the image's points"]
    for view, name in enumerate(scene.names):
        link(folder / name, folder / "images" / name)
        lens, w2c = _lens(scene.cameras, scene.size, view), scene.cameras.w2c[view].double().numpy()
        cameras.append(_row(view + 1, "PINHOLE", *(lens[key] for key in ("w", "h", "fl_x", "fl_y", "cx", "cy"))))
        images += [_row(view + 1, *quaternion(w2c[:3, :3]), *w2c[:3, 3], view + 1, name), ""]
    points = ["# POINT3D_ID, X, Y, Z, R, G, B, ERROR"]
    for index, (position, colour) in enumerate(zip(scene.points.positions, scene.points.colours, strict=True)):
        points.append(_row(index + 1, *position, *colour, 0))
    for stem, lines in (("cameras", cameras), ("images", images), ("points3D", points)):
        (sparse / f"{stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_facelift(folder: Path, scene: Scene) -> None:
    frames = []
    for view, name in enumerate(scene.names):
        lens = {key.replace("fl_", "f"): value for key, value in _lens(scene.cameras, scene.size, view).items()}
        frames.append({"file_path": name, **lens, "w2c": scene.cameras.w2c[view].tolist()})
    write_json(folder / "opencv_cameras.json", {"frames": frames})


FORMATS: dict[str, Callable[[Path, Scene], None]] = {
    "3dgs": _write_3dgs,
    "nerfstudio": _write_nerfstudio,
    "colmap": _write_colmap,
    "facelift": _write_facelift,
}


def unsupported_reason(name: str, cameras: Cameras) -> str:
    """Say why a format cannot describe the cameras; empty if it can."""
    if name == "3dgs" and not cameras.has_fov:
        return "3dgs: expected one field of view and principal points in the middle, got others"
    return ""


def choose_formats(names: Iterable[str] | None, cameras: Cameras) -> list[str]:
    """Return the formats to write: those named, or all that can describe the cameras.

    With FLAME's parameters "colmap" has to be named: in a folder with sparse/, GaussianAvatars does not look for them.

    Raises:
        ValueError: a name is unknown, its format cannot describe the cameras, or a file of FLAME's parameters is
            missing.
    """
    flame = cameras.tracking is not None and cameras.tracking.has_flame
    if names is None:
        names = [name for name in FORMATS if not unsupported_reason(name, cameras) and not (flame and name == "colmap")]
        if flame and "3dgs" not in names:
            reason = unsupported_reason("3dgs", cameras)
            warnings.warn(f"format {reason}: FLAME's parameters are not handed on", stacklevel=1)
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"format: expected some of {', '.join(FORMATS)}, got {name!r}")
        if reason := unsupported_reason(name, cameras):
            raise ValueError(f"format {reason}")
    if cameras.tracking is not None and "3dgs" in names:
        cameras.tracking.flame_files()
    return names


def link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _lens(cameras: Cameras, size: int, view: int) -> dict[str, Any]:
    """Intrinsics of one view by nerfstudio's names, in pixels."""
    if cameras.has_fov:  # in double precision
        focal, centre = cameras.focal(size), size / 2
        return {"w": size, "h": size, "fl_x": focal, "fl_y": focal, "cx": centre, "cy": centre}
    (fx, _, cx), (_, fy, cy), _ = cameras.intrinsics(size)[view].tolist()
    return {"w": size, "h": size, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy}


def _row(*values: Any) -> str:
    return " ".join(f"{value:.17g}" if isinstance(value, (float, np.floating)) else str(value) for value in values)
