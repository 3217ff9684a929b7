"""VHAP's export as cameras, and the output folder read as GaussianAvatars reads it."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import edit_json
from PIL import Image

from gafext.cameras import Cameras, orbit, read_transforms
from gafext.cameras.tracking import Tracking
from gafext.cli import main
from gafext.errors import CameraError
from gafext.output import write_views

CAMERAS = orbit(4, elevation=10, fov=35)
CAPTURED = [(0, 3, "222200042"), (0, 8, "222200037"), (1, 3, "222200042"), (1, 8, "222200037")]
SIZES = {"translation": (1, 3), "rotation": (1, 3), "neck_pose": (1, 3), "jaw_pose": (1, 3), "eyes_pose": (1, 6)}
SIZES |= {"shape": (300,), "expr": (1, 100), "static_offset": (1, 5, 3)}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """vhap/export_as_nerf_dataset.py: two timesteps from two cameras."""
    folder = tmp_path_factory.mktemp("vhap") / "export"
    (folder / "flame_param").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("canonical_flame_param", "flame_param/00000", "flame_param/00001"):
        np.savez(folder / f"{name}.npz", **{key: random.normal(size=shape) for key, shape in SIZES.items()})
    lens = {"cx": 64.0, "cy": 64.0, "fl_x": CAMERAS.focal(128), "fl_y": CAMERAS.focal(128), "h": 128, "w": 128}
    lens |= {"camera_angle_x": CAMERAS.camera_angle_x, "camera_angle_y": CAMERAS.camera_angle_x}
    frames = [
        {
            **{"timestep_index": timestep, "timestep_index_original": 7 + timestep, "timestep_id": f"frame_{timestep}"},
            **{"camera_index": camera, "camera_id": name, **lens, "transform_matrix": matrix},
            **{"file_path": f"images/{timestep:05d}_{camera:02d}.png", "fg_mask_path": "fg_masks/a.png"},
            "flame_param_path": f"flame_param/{timestep:05d}.npz",
        }
        for (timestep, camera, name), matrix in zip(CAPTURED, CAMERAS.opengl_c2w.tolist(), strict=True)
    ]
    content = {"frames": frames, **lens, "timestep_indices": [0, 1], "camera_indices": [3, 8]}
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


def generate(checkpoint, cameras, out, *options):
    Image.new("RGB", (64, 64), "white").save(out.parent / "portrait.png")
    command = ["generate", out.parent / "portrait.png", "--model", checkpoint, "--steps", 1, "--cameras", cameras]
    return main([str(word) for word in (*command, "--out", out, *options)])


def assert_is_read_by_gaussian_avatars(folder, export):
    """scene/__init__.py chooses the reader; scene/dataset_readers.py; scene/flame_gaussian_model.py, load_meshes."""
    assert not (folder / "sparse").exists()  # else it is read as COLMAP's, without FLAME
    assert (folder / "canonical_flame_param.npz").is_file()
    for split in ("train", "val", "test"):
        contents, meshes, seen = json.loads((folder / f"transforms_{split}.json").read_text()), {}, []
        for view, frame in enumerate(contents["frames"]):
            path = frame["file_path"] + ("" if ".png" in frame["file_path"] else ".png")
            assert Image.open(folder / path).size == (frame["w"], frame["h"])
            c2w = np.array(frame["transform_matrix"])
            c2w[:3, 1:3] *= -1
            assert np.abs(CAMERAS.w2c[view].numpy() - np.linalg.inv(c2w)).max() < 1e-6
            assert math.isclose(frame.get("camera_angle_x", contents["camera_angle_x"]), CAMERAS.camera_angle_x)
            seen.append((frame["timestep_index"], frame["camera_index"], frame["camera_id"]))
            if frame["timestep_index"] not in meshes:
                meshes[frame["timestep_index"]] = dict(np.load(folder / frame["flame_param_path"], allow_pickle=True))
        assert seen == CAPTURED
        assert meshes[0]["shape"].shape == (300,) and sorted(meshes) == list(range(max(meshes) + 1))
        for timestep, mesh in meshes.items():
            there = np.load(export / "flame_param" / f"{timestep:05d}.npz")
            assert {name: value.shape for name, value in mesh.items()} == SIZES
            assert all(np.array_equal(mesh[name], there[name]) for name in SIZES)


@pytest.mark.parametrize("source", ["transforms.json", ""])
def test_generate_hands_flame_on(checkpoint, export, tmp_path, source):
    assert generate(checkpoint, export / source, tmp_path / "views") == 0
    assert_is_read_by_gaussian_avatars(tmp_path / "views", export)
    canonical = [(folder / "canonical_flame_param.npz").read_bytes() for folder in (export, tmp_path / "views")]
    assert canonical[0] == canonical[1]
    # The result is cameras again, and is replaced with its files.
    assert generate(checkpoint, tmp_path / "views" / "transforms_train.json", tmp_path / "again") == 0
    assert_is_read_by_gaussian_avatars(tmp_path / "again", export)
    assert generate(checkpoint, "orbit", tmp_path / "again", "--overwrite") == 0
    assert not (tmp_path / "again" / "flame_param").exists()


def test_a_principal_point_of_vhap_is_from_the_bottom(export, tmp_path):
    """vhap/util/camera.py: "flip y of the principal point"; x is from the left."""
    shutil.copytree(export, tmp_path / "export")
    path = tmp_path / "export" / "transforms.json"
    edit_json(path, lambda whole: [frame.update(cx=60.0, cy=70.0) for frame in whole["frames"]])
    assert read_transforms(path).intrinsics(128)[0, :2, 2].tolist() == pytest.approx([60, 58])
    edit_json(path, lambda whole: whole.pop("timestep_indices"))  # as other programs write it
    assert read_transforms(path).intrinsics(128)[0, :2, 2].tolist() == pytest.approx([60, 70])


def test_save_hands_flame_on(export, tmp_path):
    cameras = read_transforms(export)
    folder = write_views(tmp_path / "views", [Image.new("RGB", (32, 32))] * 4, cameras, {})
    assert_is_read_by_gaussian_avatars(folder, export)
    again = read_transforms(folder)  # transforms.json
    assert again.tracking.frames == cameras.tracking.frames and again.tracking.flame_files()
    write_views(folder, [Image.new("RGB", (32, 32))] * 4, cameras, {}, overwrite=True, formats=["nerfstudio", "3dgs"])
    assert read_transforms(folder).tracking.frames == cameras.tracking.frames
    alone = write_views(tmp_path / "nerfstudio", [Image.new("RGB", (32, 32))] * 4, cameras, {}, formats=["nerfstudio"])
    frames = json.loads((alone / "transforms.json").read_text())["frames"]
    assert [frame["timestep_index"] for frame in frames] == [timestep for timestep, *_ in CAPTURED]
    assert not any("flame_param_path" in frame for frame in frames)
    part = write_views(tmp_path / "part", [Image.new("RGB", (32, 32))] * 2, cameras[2:], {})
    frames = json.loads((part / "transforms_train.json").read_text())["frames"]
    assert [frame["flame_param_path"] for frame in frames] == ["flame_param/00001.npz"] * 2
    assert [path.name for path in (part / "flame_param").iterdir()] == ["00001.npz"]
    named = write_views(tmp_path / "colmap", [Image.new("RGB", (32, 32))] * 4, cameras, {}, formats=["colmap"])
    assert (named / "sparse" / "0").is_dir() and not (named / "flame_param").exists()


def test_a_lens_that_3dgs_cannot_describe_loses_flame_with_a_warning(export, tmp_path):
    shutil.copytree(export, tmp_path / "export")
    edit_json(tmp_path / "export" / "transforms.json", lambda v: [frame.update(cx=60.0) for frame in v["frames"]])
    cameras = read_transforms(tmp_path / "export")
    with pytest.warns(UserWarning, match="3dgs: expected .* in the middle, .*FLAME's parameters are not handed on"):
        folder = write_views(tmp_path / "views", [Image.new("RGB", (32, 32))] * 4, cameras, {})
    assert (folder / "transforms.json").is_file() and not (folder / "flame_param").exists()


def test_null_is_no_field_and_every_camera_has_a_frame():
    frames = [{"timestep_index": 3, "flame_param_path": None, "camera_id": None}]
    tracking = Tracking.of(Path(), frames)
    assert tracking is not None and tracking.frames == ({"timestep_index": 3},) and not tracking.has_flame
    assert len(Cameras(orbit(1).w2c, 30, tracking=tracking)) == 1
    with pytest.raises(CameraError, match="tracking: expected 2 frames, one per camera, got 1"):
        Cameras(orbit(2).w2c, 30, tracking=tracking)


def test_without_flame_the_indices_are_kept(export, tmp_path):
    shutil.copy(export / "transforms.json", tmp_path)
    edit_json(tmp_path / "transforms.json", lambda v: [frame.pop("flame_param_path") for frame in v["frames"]])
    cameras = read_transforms(tmp_path / "transforms.json")
    folder = write_views(tmp_path / "views", [Image.new("RGB", (32, 32))] * 4, cameras, {})
    frames = json.loads((folder / "transforms_train.json").read_text())["frames"]
    assert [(f["timestep_index"], f["camera_index"], f["camera_id"]) for f in frames] == CAPTURED
    assert (folder / "sparse").is_dir() and not (folder / "canonical_flame_param.npz").exists()
    assert orbit(2).tracking is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("../other/flame_param/00000.npz", "frame 1: expected flame_param_path of the form flame_param/NAME.npz"),
        ("/etc/passwd", "frame 1: expected .*, got '/etc/passwd'"),
        ("flame_param/../../a.npz", "frame 1: expected"),
        (None, "frame 1: expected .*, got None; copy the file there, or remove the field from all frames"),
        ("flame_param/00009.npz", "expected flame_param/00009.npz there, .* got no such file"),
    ],
)
def test_paths_that_are_refused(checkpoint, export, tmp_path, path, words, capsys):
    shutil.copytree(export, tmp_path / "export")
    edit_json(tmp_path / "export" / "transforms.json", lambda v: v["frames"][1].update(flame_param_path=path))
    cameras = read_transforms(tmp_path / "export")
    with pytest.raises(CameraError, match=words):
        write_views(tmp_path / "views", [Image.new("RGB", (32, 32))] * 4, cameras, {})
    assert generate(checkpoint, tmp_path / "export", tmp_path / "views") == 1
    assert "16 views" not in capsys.readouterr().out and not (tmp_path / "views").exists()
    write_views(tmp_path / "views", [Image.new("RGB", (32, 32))] * 4, cameras, {}, formats=["nerfstudio"])
