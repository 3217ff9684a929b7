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


def test_every_name_of_distortion_is_refused(tmp_path):
    for name in ("k1", "k2", "k3", "k4", "k6", "p1", "p2", "distortion", "distortion_params"):
        value = [0, 0.1] if name.startswith("dist") else 0.1
        with pytest.raises(CameraError, match=f"expected no distortion, got {name}="):
            read_transforms(written(tmp_path, camera_angle_x=0.5, **{name: value}))


def test_a_byte_order_mark_and_rows_without_the_last(tmp_path):
    applied = [[0, 1, 0, 2], [1, 0, 0, 0], [0, 0, -1, 1]]
    whole = read_transforms(written(tmp_path, camera_angle_x=0.5, applied_transform=applied))
    path = written(tmp_path, {"transform_matrix": EYE[:3].tolist()}, camera_angle_x=0.5, applied_transform=applied)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert torch.equal(read_transforms(path).w2c, whole.w2c)


def test_arrays_that_contradict_or_lack_something(tmp_path):
    eyes = {"w2c": np.eye(4)[None], "c2w": np.eye(4)[None], "fov": 30}
    np.savez(tmp_path / "two.npz", **eyes)
    with pytest.raises(CameraError, match="expected w2c or c2w, got w2c, c2w"):
        read_transforms(tmp_path / "two.npz", convention="opengl-c2w")
    np.savez(tmp_path / "size.npz", w2c=np.eye(4)[None], intrinsics=np.eye(3))
    with pytest.raises(CameraError, match="expected size, .* beside intrinsics, got none"):
        read_transforms(tmp_path / "size.npz")
    np.savez(tmp_path / "upper.npz", w2c=np.eye(4)[None], fov=30)
    assert len(read_transforms((tmp_path / "upper.npz").rename(tmp_path / "UPPER.NPZ"))) == 1


def test_a_frame_without_a_matrix_is_named(tmp_path):
    path = tmp_path / "transforms.json"
    frames = [{"transform_matrix": EYE.tolist()}, {"file_path": "1.png"}]
    path.write_text(json.dumps({"camera_angle_x": 0.5, "frames": frames}))
    with pytest.raises(CameraError, match="frame 1: expected transform_matrix, or w2c in all frames, got neither"):
        read_transforms(path)


@pytest.mark.parametrize(
    ("cameras", "images", "words"),
    [
        (
            "1 PINHOLE 64 64 50 50 32",
            "1 1 0 0 0 0 0 4 1 a.png",
            "camera 1: expected fl_x fl_y cx cy of a PIN",
        ),
        ("1 SIMPLE_PINHOLE 64 64 50 32 32", "1 1 0 0 0 0 0 4 7 a.png", "a camera's id and a name, got '1 1 0"),
        ("1 SIMPLE_PINHOLE 64 64 50 32 32", "1 1 0 0 0 0 0 4 1", "a camera's id and a name, got '1 1 0"),
        ("1 SIMPLE_PINHOLE 64 64 50 32 32", "", "expected at least one image, got none"),
    ],
)
def test_lines_of_colmap_that_lack_something(tmp_path, cameras, images, words):
    (tmp_path / "cameras.txt").write_text(f"{cameras}\n")
    (tmp_path / "images.txt").write_text(f"{images}\n\n")
    with pytest.raises(CameraError, match=words):
        read_transforms(tmp_path)


def test_colmaps_models_and_quaternions_of_any_length(tmp_path):
    (tmp_path / "cameras.txt").write_text("1 SIMPLE_PINHOLE 64 64 50 30 33\n2 OPENCV 64 64 50 51 30 33 0 0 0 0.1\n")
    (tmp_path / "images.txt").write_text("1 -2 0 0 0 0 0 4 1 a.png\n\n")
    read = read_transforms(tmp_path)
    assert torch.allclose(read.w2c[0], torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]))
    assert torch.allclose(read.intrinsics(64)[0], torch.tensor([[50.0, 0, 30], [0, 50, 33], [0, 0, 1]]))
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 4 2 a.png\n\n")
    with pytest.raises(CameraError, match="expected no distortion, got p2=0.1"):
        read_transforms(tmp_path)


@pytest.mark.parametrize("prefix", ["fl_", "f"])
def test_a_frames_angle_replaces_the_files_focal_lengths(tmp_path, prefix):
    shared = {f"{prefix}x": 500, f"{prefix}y": 500, "w": 512, "h": 512}
    angle = 2 * math.atan(256 / 700)
    lens = read_transforms(written(tmp_path, {"camera_angle_x": angle}, **shared)).intrinsics(512)[0]
    assert lens[0, 0] == pytest.approx(700) and lens[1, 1] == pytest.approx(700)
    lens = read_transforms(written(tmp_path, {f"{prefix}y": 600}, **shared)).intrinsics(512)[0]
    assert lens[0, 0] == pytest.approx(500) and lens[1, 1] == pytest.approx(600)


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64)])
def test_angles_of_pictures_that_are_padded(tmp_path, width, height):
    """Each angle is of its own side; one alone is of square pixels."""
    angle = math.radians(40)
    for name, side in (("camera_angle_x", width), ("camera_angle_y", height)):
        lens = read_transforms(written(tmp_path, w=width, h=height, **{name: angle}), pad=True).intrinsics(64)[0]
        focal = side / (2 * math.tan(angle / 2))
        assert lens[0, 0] == pytest.approx(focal) and lens[1, 1] == pytest.approx(focal)
        assert lens[0, 2] == lens[1, 2] == 32


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
