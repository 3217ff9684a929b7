"""Every camera file: where pycolmap projects a cube's corners from it, and what is read back."""

import json
import math

import numpy as np
import pycolmap
import pytest
import torch
from helpers import max_abs_diff
from PIL import Image

from gafext.cameras import Cameras, orbit, read_transforms
from gafext.output import write_views

SIZE, VIEWS = 64, 3
CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
CENTRED = orbit(VIEWS, elevation=20, radius=3, fov=40, azimuth_start=15)
LENSES = [[[80.0 + 3 * v, 0, 30.25 + v], [0, 90 - v, 33.5], [0, 0, 1]] for v in range(VIEWS)]
OFF_CENTRE = Cameras(CENTRED.w2c, intrinsics=LENSES, size=SIZE)


def of_3dgs(folder):
    content = json.loads((folder / "transforms_train.json").read_text())
    focal = SIZE / (2 * math.tan(content["camera_angle_x"] / 2))
    return [(_from_opengl(f["transform_matrix"]), (focal, focal, SIZE / 2, SIZE / 2)) for f in content["frames"]]


def of_nerfstudio(folder):
    content = json.loads((folder / "transforms.json").read_text())
    frames = [{**frame, **content} for frame in content["frames"]]  # nerfstudio's rule: the file's go first
    return [(_from_opengl(f["transform_matrix"]), [f[k] for k in ("fl_x", "fl_y", "cx", "cy")]) for f in frames]


def of_colmap(folder):
    model = pycolmap.Reconstruction(folder / "sparse" / "0")
    images = sorted(model.images.values(), key=lambda image: image.name)
    return [(image.cam_from_world(), model.cameras[image.camera_id].params) for image in images]


def of_facelift(folder):
    frames = json.loads((folder / "opencv_cameras.json").read_text())["frames"]
    return [(pycolmap.Rigid3d(np.array(f["w2c"])[:3]), [f[k] for k in ("fx", "fy", "cx", "cy")]) for f in frames]


def of_npz(folder):
    found = np.load(folder / "cameras.npz")
    lenses = [(k[0, 0], k[1, 1], k[0, 2], k[1, 2]) for k in found["intrinsics"]]
    return list(zip((pycolmap.Rigid3d(m[:3].astype(float)) for m in found["w2c"]), lenses, strict=True))


def _from_opengl(c2w):
    return pycolmap.Rigid3d((np.array(c2w) @ np.diag([1.0, -1, -1, 1]))[:3]).inverse()


FILES = {
    "3dgs": (of_3dgs, "transforms_train.json"),
    "nerfstudio": (of_nerfstudio, "transforms.json"),
    "colmap": (of_colmap, "sparse/0"),
    "facelift": (of_facelift, "opencv_cameras.json"),
    "npz": (of_npz, "cameras.npz"),
}
CASES = [(name, kind) for name in FILES for kind in ("centred", "off centre") if (name, kind) != ("3dgs", "off centre")]


def save(folder, name, cameras):
    if name != "npz":
        return write_views(folder, [Image.new("RGB", (SIZE, SIZE))] * VIEWS, cameras, {}, formats=[name])
    folder.mkdir()
    np.savez(folder / "cameras.npz", w2c=cameras.w2c, intrinsics=cameras.intrinsics(SIZE), size=SIZE)
    return folder


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_corners_and_round_trip(tmp_path, name, kind):
    cameras = CENTRED if kind == "centred" else OFF_CENTRE
    folder = save(tmp_path / "views", name, cameras)
    read, file = FILES[name]
    found = read(folder)
    assert len(found) == VIEWS
    for view, (world_to_camera, lens) in enumerate(found):
        camera = pycolmap.Camera(model="PINHOLE", width=SIZE, height=SIZE, params=list(map(float, lens)))
        by_pycolmap = np.array([camera.img_from_cam(world_to_camera * corner) for corner in CORNERS]).reshape(8, 2)
        there = torch.from_numpy(CORNERS) @ cameras.w2c[view, :3, :3].double().T + cameras.w2c[view, :3, 3].double()
        by_us = there @ cameras.intrinsics(SIZE)[view].double().T
        assert max_abs_diff(by_us[:, :2] / by_us[:, 2:], torch.from_numpy(by_pycolmap)) < 2e-5  # pixels
    again = read_transforms(folder / file)
    assert max_abs_diff(again.w2c, cameras.w2c) < 1e-6
    assert max_abs_diff(again.intrinsics(1), cameras.intrinsics(1)) < 1e-6
