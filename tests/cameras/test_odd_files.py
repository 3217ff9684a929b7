"""Camera files that are damaged, or that say one thing at two places."""

import json
import math

import numpy as np
import pytest
import torch

from gafext.cameras import orbit, read_transforms, spiral
from gafext.errors import CameraError

EYE = np.diag([1.0, 1, 1, 1])
EYE[2, 3] = 4.0  # OpenGL axes: in front of the face, looking at it


def written(folder, frame=None, **values):
    """Path of a transforms.json of one frame."""
    path = folder / "transforms.json"
    path.write_text(json.dumps({**values, "frames": [{"transform_matrix": EYE.tolist(), **(frame or {})}]}))
    return path


@pytest.mark.parametrize(
    "values, words",
    [
        ({"camera_angle_x": 0.5, "is_fisheye": True}, "expected no distortion, got is_fisheye=True"),
        ({"camera_angle_x": 0.5, "k5": 0.1}, "expected no distortion, got k5=0.1"),
        ({"camera_angle_x": 0.5, "cx": 256, "cy": 256}, "expected w and h beside cx and cy, got none"),
        ({"fl_x": 500, "w": 0, "h": 0}, "expected positive w and h, got 0 x 0"),
        ({"fl_x": 500, "w": 512, "h": 512, "cx": math.nan}, "expected finite numbers"),
    ],
)
def test_what_cannot_be_meant(values, words, tmp_path):
    with pytest.raises(CameraError, match=words):
        read_transforms(written(tmp_path, **values))


def test_a_frames_angle_replaces_the_files_focal_lengths(tmp_path):
    shared = {"fl_x": 500, "fl_y": 500, "w": 512, "h": 512}
    angle = 2 * math.atan(256 / 700)
    lens = read_transforms(written(tmp_path, {"camera_angle_x": angle}, **shared)).intrinsics(512)[0]
    assert lens[0, 0] == pytest.approx(700) and lens[1, 1] == pytest.approx(700)
    lens = read_transforms(written(tmp_path, {"fl_y": 600}, **shared)).intrinsics(512)[0]
    assert lens[0, 0] == pytest.approx(500) and lens[1, 1] == pytest.approx(600)


def test_null_is_no_value(tmp_path):
    nothing = {"cx": None, "fl_y": None, "k1": None, "camera_model": None, "is_fisheye": False}
    cameras = read_transforms(written(tmp_path, nothing, fl_x=500, w=512, h=512))
    assert cameras.has_fov and cameras.fov == pytest.approx(math.degrees(2 * math.atan(256 / 500)))


def test_damaged_files_are_named(tmp_path):
    np.savez(tmp_path / "whole.npz", w2c=np.eye(4)[None])
    whole = (tmp_path / "whole.npz").read_bytes()
    files = {
        "empty.npy": b"",
        "empty.npz": b"",
        "short.npz": whole[: len(whole) // 2],
        "damaged.npz": whole.replace(b"NUMPY", b"numpy"),
        "deep.json": b"[" * 100_000,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CameraError, match=name):
            read_transforms(tmp_path / name, convention="opencv-w2c", fov=30)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("null", "not readable as cameras"),
        ('"frames"', "not readable as cameras"),
        ('{"frames": {"0": {}}, "camera_angle_x": 0.5}', "frames: expected a list of objects, got {'0'"),
        ('{"frames": "abc"}', "frames: expected a list of objects, got abc"),
        ('{"frames": [null]}', "frames: expected a list of objects"),
        ('{"frames": [{"transform_matrix": [1, 2, 3, 4]}], "camera_angle_x": 0.5}', "matri"),
        ('{"frames": [{"transform_matrix": [1, 2]}], "camera_angle_x": 0.5, "applied_scale": 2}', "matri|readable"),
        ('{"frames": [{"transform_matrix": 5}], "camera_angle_x": 0.5}', "matri|readable"),
    ],
)
def test_frames_that_are_none(content, words, tmp_path):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(CameraError, match=words) as caught:
        read_transforms(tmp_path / "odd.json")
    assert "odd.json" in str(caught.value)


def test_a_folder_is_read_as_the_file_in_it(tmp_path):
    (tmp_path / "sparse" / "0").mkdir(parents=True)
    (tmp_path / "sparse" / "0" / "images.bin").touch()
    with pytest.raises(CameraError, match="colmap model_converter"):
        read_transforms(tmp_path)
    path = written(tmp_path, fl_x=500, w=640, h=480)  # as colmap2nerf writes it beside COLMAP's files
    with pytest.raises(CameraError, match="expected square pictures"):
        read_transforms(tmp_path)
    folder, file = (read_transforms(place, pad=True) for place in (tmp_path, path))
    assert torch.equal(folder.w2c, file.w2c) and torch.equal(folder.intrinsics(64), file.intrinsics(64))


def test_colmaps_images_without_lines_of_points(tmp_path):
    (tmp_path / "cameras.txt").write_text("# Camera list\n\n1 PINHOLE 512 512 500 500 256 256\n")
    lines = [f"{number} 1 0 0 0 0 0 4 1 {number}.png" for number in (1, 2)]
    (tmp_path / "images.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(CameraError, match="expected a line of points"):
        read_transforms(tmp_path)
    spaced = [f"{number} 1 0 0 0 0 0 4 1 my picture {number}.png" for number in (1, 2)]  # 12 words
    (tmp_path / "images.txt").write_text("\n".join(spaced) + "\n")
    with pytest.raises(CameraError, match="expected a line of points"):
        read_transforms(tmp_path)
    (tmp_path / "images.txt").write_text("\n".join([lines[0], "1.5 2.5 -1", lines[1], ""]) + "\n")
    assert len(read_transforms(tmp_path)) == 2


def test_slices_in_reverse_and_one_elevation():
    cameras = orbit(5)
    assert torch.equal(cameras[::-1].w2c, cameras.w2c.flip(0)) and torch.equal(cameras[3:0:-2].w2c, cameras.w2c[[3, 1]])
    level = spiral(4, elevation=10)
    assert torch.equal(level.w2c, spiral(4, elevation=(10, 10)).w2c)
