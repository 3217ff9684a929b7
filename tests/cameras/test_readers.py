"""Camera files of other programs."""

import json
import math

import numpy as np
import pycolmap
import pytest
from helpers import max_abs_diff

from gafext.cameras import CONVENTIONS, Cameras, orbit, read_transforms
from gafext.errors import CameraError

CAMERAS = orbit(3, elevation=20, radius=2.5, fov=40)
C2W = CAMERAS.opengl_c2w.double().numpy()
LENS = {"fl_x": 55.0, "fl_y": 56.0, "cx": 30.0, "cy": 33.5, "w": 64, "h": 64}
K = [[55.0, 0, 30], [0, 56, 33.5], [0, 0, 1]]


def write(path, values=None, **changes):
    """A transforms.json; fields that are None are left out."""
    frames = [{"file_path": f"./images/{view}.png", "transform_matrix": m.tolist()} for view, m in enumerate(C2W)]
    values = {**LENS, "frames": frames, **(values or {}), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return path


def assert_same(cameras, intrinsics, size=64):
    assert max_abs_diff(cameras.w2c, CAMERAS.w2c) < 1e-6
    wanted = Cameras(CAMERAS.w2c, intrinsics=intrinsics, size=size)
    assert max_abs_diff(cameras.intrinsics(size), wanted.intrinsics(size)) < 1e-4


def test_nerfstudio(tmp_path):
    assert_same(read_transforms(write(tmp_path / "transforms.json")), K)
    assert_same(read_transforms(tmp_path), K)


def test_intrinsics_of_a_frame_go_first(tmp_path):
    frames = [{"transform_matrix": m.tolist(), "fl_x": 50.0 + view} for view, m in enumerate(C2W)]
    wanted = [[[50.0 + view, 0, 30], *K[1:]] for view in range(3)]
    assert_same(read_transforms(write(tmp_path / "a.json", frames=frames)), wanted)


def test_an_applied_transform_is_undone(tmp_path):
    applied = np.array([[0.0, 1, 0, 2], [1, 0, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]])
    frames = [{"transform_matrix": (applied @ m).tolist()} for m in C2W]
    path = write(tmp_path / "a.json", frames=frames, applied_transform=applied[:3].tolist())
    assert_same(read_transforms(path), K)
    for frame in frames:
        for row in frame["transform_matrix"][:3]:
            row[3] *= 0.25
    path = write(tmp_path / "a.json", frames=frames, applied_transform=applied[:3].tolist(), applied_scale=0.25)
    assert_same(read_transforms(path), K)


@pytest.mark.parametrize("place", ["file", "frame"])
def test_blender(tmp_path, place):
    angle = {"camera_angle_x": math.radians(40)}
    frames = [{"file_path": "./train/r_0", "transform_matrix": m.tolist()} for m in C2W]
    values = angle if place == "file" else {}
    frames = frames if place == "file" else [{**frame, **angle} for frame in frames]
    (tmp_path / "transforms_train.json").write_text(json.dumps({**values, "frames": frames}))
    cameras = read_transforms(tmp_path)
    assert cameras.has_fov and abs(cameras.fov - 40) < 1e-9
    values = {**angle, "camera_angle_y": math.radians(50), "w": 64, "h": 64}
    (tmp_path / "transforms_train.json").write_text(json.dumps({**values, "frames": frames}))
    focal_y = 32 / math.tan(math.radians(25))
    if place == "file":
        values.pop("camera_angle_x")
        (tmp_path / "y.json").write_text(json.dumps({**values, "frames": frames}))  # pixels are square
        y = read_transforms(tmp_path / "y.json").intrinsics(64)[0]
        assert y[0, 0].item() == y[1, 1].item() == pytest.approx(focal_y)
    frames_own = place == "frame"  # whose angle takes the place of the file's two
    assert read_transforms(tmp_path).intrinsics(64)[0, 1, 1].item() == pytest.approx(
        32 / math.tan(math.radians(20)) if frames_own else focal_y
    )
    assert max_abs_diff(cameras.w2c, CAMERAS.w2c) < 1e-6


def test_colmap_as_pycolmap_writes_it(tmp_path):
    model = pycolmap.Reconstruction()
    for view in (2, 0, 1):  # the order of the numbers is not that of the names
        camera = pycolmap.Camera(model="PINHOLE", width=64, height=64, params=[55, 56, 30, 33.5], camera_id=view + 1)
        model.add_camera_with_trivial_rig(camera)
        image = pycolmap.Image(name=f"{view}.png", camera_id=view + 1, image_id=9 - view)
        w2c = CAMERAS.w2c[view].double().numpy()
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(w2c[:3]))
    folder = tmp_path / "sparse" / "0"
    folder.mkdir(parents=True)
    model.write_text(folder)
    assert_same(read_transforms(tmp_path), K)
    assert_same(read_transforms(folder), K)
    with pytest.raises(CameraError, match="fov: expected none beside the one that the file has, got 40"):
        read_transforms(folder, fov=40)
    (tmp_path / "one").mkdir()
    folder.rename(tmp_path / "one" / "sparse")  # of a single model, as some programs write it
    assert_same(read_transforms(tmp_path / "one"), K)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("rows", [3, 4])
def test_bare_matrices(tmp_path, convention, rows):
    axes, direction = convention.split("-")
    c2w = C2W if axes != "opencv" else CAMERAS.c2w.double().numpy()
    matrices = (c2w if direction == "c2w" else np.linalg.inv(c2w))[:, :rows]
    np.save(tmp_path / "a.npy", matrices)
    np.savez(tmp_path / "a.npz", **{direction: matrices}, intrinsics=K, size=64)
    (tmp_path / "a.json").write_text(json.dumps(matrices.tolist()))
    for name in ("a.npy", "a.json"):
        cameras = read_transforms(tmp_path / name, convention=convention, fov=40)
        assert max_abs_diff(cameras.w2c, CAMERAS.w2c) < 1e-5 and cameras.fov == 40
    cameras = read_transforms(tmp_path / "a.npz", convention=convention)
    assert max_abs_diff(cameras.w2c, CAMERAS.w2c) < 1e-5
    assert max_abs_diff(cameras.intrinsics(64), Cameras(CAMERAS.w2c, intrinsics=K, size=64).intrinsics(64)) < 1e-4


def test_the_convention_must_be_named(tmp_path):
    np.savez(tmp_path / "w2c.npz", w2c=CAMERAS.w2c, fov=40.0)
    assert max_abs_diff(read_transforms(tmp_path / "w2c.npz").w2c, CAMERAS.w2c) < 1e-6
    np.savez(tmp_path / "c2w.npz", c2w=C2W, fov=40.0)
    np.save(tmp_path / "a.npy", C2W)
    (tmp_path / "a.json").write_text(json.dumps(C2W.tolist()))
    for name in ("c2w.npz", "a.npy", "a.json"):
        with pytest.raises(CameraError, match=f"{name}: expected the convention of the matrices, one of opencv-w2c"):
            read_transforms(tmp_path / name)
    with pytest.raises(CameraError, match="expected the convention of the matrices, .*got opengl-w2c"):
        read_transforms(tmp_path / "c2w.npz", convention="opengl-w2c")
    with pytest.raises(CameraError, match="field of view"):
        read_transforms(tmp_path / "a.npy", convention="opengl-c2w")
    with pytest.raises(CameraError, match="convention: expected one of opencv-w2c, .*got 'maya'"):
        read_transforms(tmp_path / "a.npy", convention="maya", fov=40)


def test_what_the_file_has_is_not_given(tmp_path):
    write(tmp_path / "transforms.json")
    np.savez(tmp_path / "lens.npz", w2c=CAMERAS.w2c, intrinsics=K, size=64)
    np.savez(tmp_path / "angle.npz", w2c=CAMERAS.w2c, fov=40.0)
    np.savez(tmp_path / "both.npz", w2c=CAMERAS.w2c, intrinsics=K, size=64, fov=40.0)
    with pytest.raises(CameraError, match="expected intrinsics or fov, got both"):
        read_transforms(tmp_path / "both.npz")
    for name in ("transforms.json", "", "lens.npz", "angle.npz"):
        with pytest.raises(CameraError, match="fov: expected none beside the one that the file has, got 30"):
            read_transforms(tmp_path / name, fov=30)
    for name in ("transforms.json", ""):
        with pytest.raises(CameraError, match="convention: expected none beside .* got opencv-c2w"):
            read_transforms(tmp_path / name, convention="opencv-c2w")


def test_frames_without_intrinsics_take_a_field_of_view(tmp_path):
    write(tmp_path / "transforms.json", fl_x=None, fl_y=None, cx=None, cy=None)
    for path in (tmp_path / "transforms.json", tmp_path):
        cameras = read_transforms(path, fov=40)
        assert max_abs_diff(cameras.w2c, CAMERAS.w2c) < 1e-5 and abs(cameras.fov - 40) < 1e-4
        with pytest.raises(CameraError, match="fov: expected 0 < fov < 180, got 180"):
            read_transforms(path, fov=180)
    frames = [
        {"transform_matrix": m.tolist(), "camera_angle_x": angle}
        for m, angle in zip(C2W, (None, 0.7, 0.7), strict=True)
    ]
    write(tmp_path / "transforms.json", frames=frames, fl_x=None, fl_y=None)
    with pytest.raises(CameraError, match="fov: expected none beside the one that the file has, got 40"):
        read_transforms(tmp_path, fov=40)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k1": 0.1}, "frame 0: expected no distortion, got k1=0.1; undistort the pictures first"),
        ({"p2": -0.01}, "expected no distortion, got p2=-0.01"),
        ({"camera_model": "OPENCV_FISHEYE"}, "expected a pinhole camera, got camera_model 'OPENCV_FISHEYE'"),
        ({"w": 80}, "frame 0: expected square pictures, got 80 x 64; crop or pad them first"),
        ({"w": None, "h": None}, "expected w and h beside the focal length"),
        ({"fl_x": None, "fl_y": None}, "frame 0: expected fl_x, fx or camera_angle_x, or a field of view"),
        ({"fl_x": None, "camera_angle_x": 4.0}, "expected 0 < camera_angle_x < pi radians, got 4"),
        ({"fl_x": -3.0}, "expected positive focal lengths, got"),
        ({"frames": []}, "frames: expected at least one, got none"),
        ({"frames": [{"file_path": "a.png"}]}, "frame 0: expected transform_matrix"),
        ({"frames": [{"transform_matrix": np.diag([2.0, 2, 2, 1]).tolist()}]}, "camera 0: expected a rotation"),
        ({"frames": [{"transform_matrix": np.zeros((4, 4)).tolist()}]}, "camera 0"),
        ({"applied_transform": [[0, 0, 0, 0]] * 3}, "LinAlgError|Singular"),
    ],
)
def test_what_is_refused(tmp_path, changes, words):
    path = write(tmp_path / "transforms.json", **changes)
    with pytest.raises(CameraError, match=words) as caught:
        read_transforms(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "zeros", [{"k1": 0, "k2": 0.0, "p1": 0, "p2": 0}, {"distortion_params": [0, 0, 0]}, {"k1": None}]
)
def test_distortion_of_zero_is_none(tmp_path, zeros):
    assert_same(read_transforms(write(tmp_path / "a.json", zeros)), K)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(CameraError, match=r"expected transforms.json, .*COLMAP's images.txt in it, got none"):
        read_transforms(tmp_path)
    (tmp_path / "images.bin").write_bytes(b"")
    with pytest.raises(CameraError, match="colmap model_converter --input_path"):
        read_transforms(tmp_path)
    (tmp_path / "cameras.txt").write_text("1 OPENCV 64 64 55 56 30 33 0.2 0 0 0\n2 FULL_OPENCV 64 64\n")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 3 1 a.png\n\n")
    with pytest.raises(CameraError, match="camera 2: expected one of SIMPLE_PINHOLE, .*got FULL_OPENCV"):
        read_transforms(tmp_path)
    (tmp_path / "cameras.txt").write_text("1 OPENCV 64 64 55 56 30 33 0.2 0 0 0\n")
    with pytest.raises(CameraError, match=r"expected no distortion, got k1=0.2"):
        read_transforms(tmp_path)
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 80 64 55 56 40 32\n")
    with pytest.raises(CameraError, match="frame 0: expected square pictures, got 80 x 64"):
        read_transforms(tmp_path)
    frame = {"w": 64, "h": 80, "fx": 55, "fy": 55, "cx": 32, "cy": 40, "w2c": CAMERAS.w2c[0].tolist()}
    (tmp_path / "opencv_cameras.json").write_text(json.dumps({"frames": [frame]}))
    with pytest.raises(CameraError, match="frame 0: expected square pictures, got 64 x 80"):
        read_transforms(tmp_path / "opencv_cameras.json")
    with pytest.raises(CameraError, match="not readable as cameras"):
        read_transforms(tmp_path / "missing.json")
