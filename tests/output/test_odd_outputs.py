"""Pictures, cameras and folders that are unlike those of an ordinary run."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from gafext.atomic import whole_folder
from gafext.cameras import orbit, read_transforms, spiral
from gafext.output import VIEW_FILES, MultiViewOutput, write_viewer
from gafext.output.output import json_clean, write_views
from gafext.output.points import Points
from gafext.output.turn import turn

FAST = {"formats": ["nerfstudio"], "turntable": "none"}


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "I;16"])
def test_pictures_of_any_mode(mode, tmp_path):
    grey = Image.new("RGB", (16, 16), (102, 102, 102))
    picture = Image.fromarray(np.full((16, 16), 102 * 257, np.uint16)) if mode == "I;16" else grey.convert(mode)
    folder = write_views(tmp_path / "views", [picture] * 2, orbit(2), {}, portrait=picture, **FAST)
    for name in ("view_001.png", "portrait.png"):
        with Image.open(folder / name) as written:
            assert np.abs(np.asarray(written.convert("RGB")).astype(int) - 102).max() <= 1


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 16, 16, 3), np.uint8), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, 4, 16, 16)],
    ids=["array of integers", "tensor of integers", "latents"],
)
def test_arrays_that_are_no_pictures_are_named(images, tmp_path):
    with pytest.raises(ValueError, match=r"save: expected images \[V,3,H,W\]"):
        MultiViewOutput(images, orbit(2)).save(tmp_path / "views", **FAST)
    assert not (tmp_path / "views").exists()


def test_numbers_that_are_no_colours_are_named(tmp_path):
    images = torch.zeros(2, 3, 16, 16)
    images[1, 2, 3, 4] = float("nan")
    for words in ("got NaN", r"got \[-1, 200\]", "got \\[-0.5, 0\\]"):
        with pytest.raises(ValueError, match=rf"images\[1\]: expected .* in \[0, 1\], {words}"):
            MultiViewOutput(images, orbit(2)).save(tmp_path / "views", **FAST)
        images[1, 2, 3, 4], images[1, 0, 0, 0] = (-0.5, 0) if "200" in words else (200, -1)
    assert not (tmp_path / "views").exists()


@pytest.mark.parametrize("sizes", [[(16, 24)] * 2, [(16, 16), (24, 24)]], ids=str)
def test_pictures_that_are_not_square_or_of_one_size(sizes, tmp_path):
    with pytest.raises(ValueError, match="images: expected square images of one size, got"):
        write_views(tmp_path / "views", [Image.new("RGB", size) for size in sizes], orbit(2), {}, **FAST)
    assert not (tmp_path / "views").exists()


def test_an_array_with_negative_strides(tmp_path):
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    MultiViewOutput(images[::-1, :, ::-1], orbit(2)).save(tmp_path / "views", **FAST)
    with Image.open(tmp_path / "views" / "view_001.png") as written:
        assert np.abs(np.asarray(written) / 255 - images[0, :, ::-1]).max() < 0.01


def test_pictures_are_upright_and_over_white(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:4] = (255, 0, 0)
    turned, green = Image.fromarray(pixels), Image.new("RGB", (16, 16), (0, 255, 0))
    turned.getexif()[0x0112] = 6  # EXIF's orientation: a quarter of a turn clockwise
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif(), quality=100, subsampling=0)
    green.save(tmp_path / "green.png", transparency=(0, 255, 0))
    with Image.open(tmp_path / "turned.jpg") as first, Image.open(tmp_path / "green.png") as second:
        given = [first, second]
        folder = write_views(tmp_path / "views", given, orbit(2), {}, portrait=first, normal_maps=given, **FAST)
    for name in ("view_000.png", "portrait.png", "normals/view_000.png"):
        right = np.asarray(Image.open(folder / name).convert("RGB"))[:, -2:].astype(int)
        assert np.abs(right - (255, 0, 0)).max() < 20, name
    assert np.asarray(Image.open(folder / "view_001.png")).min() == 255
    assert set(np.asarray(Image.open(folder / "normals/view_001.png")).flat) == {128}


def test_names_of_more_than_a_thousand_views_are_in_order(tmp_path, monkeypatch):
    cameras = orbit(1001)
    no_points = Points(*(np.zeros((0, 3), kind) for kind in (np.float32, np.float32, np.uint8)))
    monkeypatch.setattr("gafext.output.output.surface_points", lambda *_: no_points)  # they take half a minute
    monkeypatch.setattr("gafext.output.output.contact_sheet", lambda *_: Image.new("RGB", (2, 2)))
    views = [Image.new("RGB", (2, 2))] * len(cameras)
    folder = write_views(tmp_path / "views", views, cameras, {}, formats=["colmap"], turntable="none")
    assert torch.allclose(read_transforms(folder).w2c, cameras.w2c, atol=1e-6)


def test_points_that_3dgs_keeps_beside_colmaps_do_not_count(tmp_path):
    views = [Image.new("RGB", (8, 8))] * 2
    folder = write_views(tmp_path / "views", views, orbit(2), {}, formats=["colmap"], turntable="none")
    (folder / "sparse/0/points3D.ply").touch()
    write_views(folder, views, orbit(2), {}, overwrite=True, **FAST)
    assert not (folder / "sparse").exists()


def test_views_of_one_pixel(tmp_path):
    folder = write_views(tmp_path / "views", [Image.new("RGB", (1, 1))] * 2, orbit(2), {})
    assert (folder / "turntable.webp").is_file()


def test_no_points_no_file_of_points(tmp_path):
    """3DGS fails with an empty file, and draws points of its own without one."""
    away = orbit(2).with_poses(torch.diag(torch.tensor([-1.0, 1, -1, 1])) @ orbit(2).w2c)
    pictures = [Image.new("RGB", (16, 16))] * 2
    folder = write_views(tmp_path / "views", pictures, away, {}, turntable="none")
    assert not (folder / "points3d.ply").exists()
    assert "ply_file_path" not in json.loads((folder / "transforms.json").read_text())


def test_one_format_by_its_name(tmp_path):
    folder = write_views(
        tmp_path / "views", [Image.new("RGB", (16, 16))] * 2, orbit(2), {}, formats="colmap", turntable="none"
    )
    assert (folder / "sparse").is_dir() and not (folder / "transforms_train.json").exists()


def test_views_of_a_spiral_keep_their_order():
    order, closed = turn(spiral(16))
    assert order == list(range(16)) and not closed
    assert turn(orbit(8)).closed and turn(orbit(8, azimuth_start=90)).closed


def test_what_finder_and_explorer_leave_does_not_count(tmp_path):
    for name in (".DS_Store", "Thumbs.db"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        for replaceable in (None, VIEW_FILES):
            with whole_folder(folder, replaceable=replaceable) as new:
                (new / "run.json").touch()
            assert os.listdir(folder) == ["run.json"]
            (folder / "run.json").unlink()
            (folder / name).touch()


def test_a_folder_keeps_its_permissions(tmp_path):
    target = tmp_path / "shared"
    target.mkdir()
    target.chmod(0o2775)
    with whole_folder(target) as new:
        (new / "run.json").touch()
    assert stat.S_IMODE(target.stat().st_mode) == 0o2775


def test_pictures_of_the_users_own_are_no_views(tmp_path):
    folder = write_views(tmp_path / "views", [Image.new("RGB", (16, 16))] * 2, orbit(2), {}, turntable="none")
    Image.new("RGB", (8, 8)).save(folder / "view_crop.png")
    assert write_viewer(folder).name == "index.html"


def test_classes_in_a_run():
    assert json_clean({"dtype": np.float32, "value": np.float32(2)}) == {"dtype": str(np.float32), "value": 2.0}
