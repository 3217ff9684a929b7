"""The folder that `gafext generate` writes, read as each program reads it: the steps and the fields of its loader."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
import torch.nn.functional as F
from helpers import max_abs_diff
from PIL import Image
from plyfile import PlyData

from gafext.cameras import Cameras, orbit, read_transforms
from gafext.cli import main
from gafext.errors import OutputError
from gafext.heads import make_heads, render
from gafext.output import FORMATS, write_views
from gafext.output.alpha import with_alpha
from gafext.output.points import surface_points

VIEWS = 3


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """The default output: every format."""
    work = tmp_path_factory.mktemp("generate")
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(work / "portrait.png")
    options = ["--views", VIEWS, "--elevation", 10, "--steps", 1, "--out", work / "views"]
    assert main([str(a) for a in ("generate", work / "portrait.png", "--model", checkpoint, *options)]) == 0
    return work / "views"


CORNERS = torch.tensor([[x, y, z, 1.0] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])


def projected(w2c, focal, centre):
    """Pixels [8,2] of a cube's corners: x_camera = w2c x, u = f x/z + c."""
    there = CORNERS.double() @ torch.as_tensor(np.asarray(w2c)).double()[:3].T
    return there[:, :2] / there[:, 2:] * torch.tensor(focal).double() + torch.tensor(centre).double()


def expected(folder, view):
    cameras = orbit(VIEWS, elevation=10)
    size = Image.open(folder / "view_000.png").width
    return projected(cameras.w2c[view], (cameras.focal(size),) * 2, (size / 2,) * 2)


def opengl(matrix):
    """The steps of 3DGS and of GaussianAvatars: Blender's axes to COLMAP's, then inverted."""
    c2w = np.array(matrix)
    c2w[:3, 1:3] *= -1
    return np.linalg.inv(c2w)


@pytest.mark.parametrize("split", ["train", "test"])
def test_3dgs(folder, split):
    """scene/dataset_readers.py, readCamerasFromTransforms and fetchPly."""
    contents = json.loads((folder / f"transforms_{split}.json").read_text())
    fov = contents["camera_angle_x"]
    assert len(contents["frames"]) == VIEWS
    for view, frame in enumerate(contents["frames"]):
        image = Image.open(os.path.join(folder, frame["file_path"] + ".png"))
        focal = image.width / (2 * math.tan(fov / 2))
        pixels = projected(opengl(frame["transform_matrix"]), (focal,) * 2, (image.width / 2,) * 2)
        assert max_abs_diff(pixels, expected(folder, view)) < 1e-4
    vertices = PlyData.read(folder / "points3d.ply")["vertex"]
    positions = np.vstack([vertices["x"], vertices["y"], vertices["z"]]).T
    colours = np.vstack([vertices["red"], vertices["green"], vertices["blue"]]).T / 255.0
    normals = np.vstack([vertices["nx"], vertices["ny"], vertices["nz"]]).T
    assert len(positions) > 1000 and np.abs(positions).max() < 1.5 and 0 <= colours.min() <= colours.max() <= 1
    assert np.abs(np.linalg.norm(normals, axis=1) - 1).max() < 1e-3


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_gaussian_avatars(folder, split):
    """scene/dataset_readers.py, readCamerasFromTransforms: sizes per frame, camera_index only beside camera_id."""
    contents = json.loads((folder / f"transforms_{split}.json").read_text())
    for view, frame in enumerate(contents["frames"]):
        name = frame["file_path"] if frame["file_path"].endswith(".png") else frame["file_path"] + ".png"
        assert (folder / name).is_file() and frame["timestep_index"] == 0
        assert "camera_id" in frame and frame["camera_index"] == view
        assert frame["w"] == frame["h"] == Image.open(folder / name).width
        assert {"cx", "cy", "fl_x", "fl_y", "camera_angle_x"} <= contents.keys()


def test_nerfstudio(folder):
    """data/dataparsers/nerfstudio_dataparser.py: a folder has transforms.json, with intrinsics in pixels."""
    meta = json.loads((folder / "transforms.json").read_text())
    assert meta.get("camera_model", "OPENCV") in ("OPENCV", "PERSPECTIVE")
    for view, frame in enumerate(meta["frames"]):
        image = Image.open(folder / Path(frame["file_path"]))
        values = {**meta, **frame}
        assert (int(values["w"]), int(values["h"])) == image.size
        focal, centre = (values["fl_x"], values["fl_y"]), (values["cx"], values["cy"])
        pixels = projected(opengl(frame["transform_matrix"]), focal, centre)
        assert max_abs_diff(pixels, expected(folder, view)) < 1e-4
    assert (folder / meta["ply_file_path"]).is_file()


def test_brush(folder):
    """formats/nerfstudio.rs: transforms.json first, names with extension, no camera_model that it does not know."""
    meta = json.loads((folder / "transforms.json").read_text())
    assert "camera_model" not in meta
    assert all((folder / frame["file_path"]).suffix == ".png" for frame in meta["frames"])


def test_gsplat(folder):
    """examples/datasets/colmap.py: sparse/0 through pycolmap, pictures of images/."""
    model = pycolmap.Reconstruction(folder / "sparse" / "0")
    images = sorted(model.images.values(), key=lambda image: image.name)
    assert [image.name for image in images] == sorted(os.listdir(folder / "images"))
    for view, image in enumerate(images):
        camera = model.cameras[image.camera_id]
        assert camera.model.name == "PINHOLE" and (folder / "images" / image.name).samefile(folder / image.name)
        w2c = image.cam_from_world().matrix()
        fx, fy, cx, cy = camera.params
        assert max_abs_diff(projected(w2c, (fx, fy), (cx, cy)), expected(folder, view)) < 1e-4
        by_pycolmap = [camera.img_from_cam(there[:3]) for there in CORNERS.double().numpy() @ w2c.T]
        assert max_abs_diff(torch.tensor(np.array(by_pycolmap)).reshape(8, 2), expected(folder, view)) < 1e-4
    assert len(model.points3D) > 1000


def test_facelift(folder):
    """Its reconstruction's opencv_cameras.json: w2c and intrinsics in pixels of every frame."""
    frames = json.loads((folder / "opencv_cameras.json").read_text())["frames"]
    for view, frame in enumerate(frames):
        pixels = projected(frame["w2c"], (frame["fx"], frame["fy"]), (frame["cx"], frame["cy"]))
        assert max_abs_diff(pixels, expected(folder, view)) < 1e-4
        assert frame["w"] == frame["h"] == Image.open(folder / "view_000.png").width


SOURCES = ["transforms.json", "transforms_train.json", "opencv_cameras.json", "sparse/0", ""]


@pytest.mark.parametrize("source", SOURCES)
def test_every_format_is_read_back(folder, source):
    again, cameras = read_transforms(folder / source), orbit(VIEWS, elevation=10)
    assert max_abs_diff(again.w2c, cameras.w2c) < 1e-6 and abs(again.fov - 30) < 1e-5


def lenses(tmp_path):
    """Views with intrinsics of their own, written in every format that can hold them."""
    matrices = [[[60 + v, 0, 30.5], [0, 61 + v, 33 - v], [0, 0, 1]] for v in range(VIEWS)]
    cameras = Cameras(orbit(VIEWS).w2c, intrinsics=matrices, size=64)
    pictures = [Image.new("RGB", (64, 64), (0, 80 * view, 0)) for view in range(VIEWS)]
    return cameras, write_views(tmp_path / "views", pictures, cameras, {})


def test_a_format_that_cannot_hold_the_cameras_is_left_out_or_refused(tmp_path):
    cameras, folder = lenses(tmp_path)
    assert not (folder / "transforms_train.json").exists()
    pictures = [Image.new("RGB", (64, 64))] * VIEWS
    with pytest.raises(ValueError, match="format 3dgs: expected one field of view"):
        write_views(tmp_path / "other", pictures, cameras, {}, formats=["3dgs"])
    with pytest.raises(ValueError, match="format: expected some of 3dgs, nerfstudio, colmap, facelift, got 'obj'"):
        write_views(tmp_path / "other", pictures, cameras, {}, formats=["obj"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_one_format_alone(tmp_path, name):
    folder = write_views(tmp_path / "views", [Image.new("RGB", (32, 32))], orbit(1), {}, formats=[name])
    always = {"view_000.png", "contact_sheet.png", "turntable.webp", "index.html", "run.json"}
    own = {
        "3dgs": {"transforms_train.json", "transforms_test.json", "transforms_val.json", "points3d.ply"},
        "nerfstudio": {"transforms.json", "points3d.ply"},
        "colmap": {"images", "sparse"},
        "facelift": {"opencv_cameras.json"},
    }
    assert set(os.listdir(folder)) == always | own[name]


def test_an_earlier_result_is_replaced_with_its_folders(tmp_path):
    options = {"alpha": True}
    folder = write_views(tmp_path / "views", [Image.new("RGB", (32, 32))] * 2, orbit(2), {}, **options)
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    assert [frame["mask_path"] for frame in frames] == ["masks/view_000.png", "masks/view_001.png"]
    folder = write_views(tmp_path / "views", [Image.new("RGB", (32, 32))], orbit(1), {}, overwrite=True, **options)
    assert os.listdir(folder / "images") == os.listdir(folder / "masks") == ["view_000.png"]
    (folder / "images" / "mine.txt").write_text("years of work")
    with pytest.raises(OutputError, match="mine.txt"):
        write_views(folder, [Image.new("RGB", (32, 32))], orbit(1), {}, overwrite=True)


def test_points_lie_where_the_views_see_them(tmp_path):
    """A view that is red colours red the points that it alone sees."""
    cameras = orbit(2)
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    folder = write_views(tmp_path / "views", pictures, cameras, {})
    vertices = PlyData.read(folder / "points3d.ply")["vertex"]
    front = vertices["z"] > 0.2
    assert (vertices["red"][front] == 255).mean() > 0.95 and (
        vertices["blue"][vertices["z"] < -0.3] == 255
    ).mean() > 0.95
    colmaps = pycolmap.Reconstruction(folder / "sparse" / "0").points3D
    for index, vertex in enumerate(vertices, 1):
        assert colmaps[index].xyz.tolist() == [vertex[name] for name in "xyz"]
        assert colmaps[index].color.tolist() == [vertex[name] for name in ("red", "green", "blue")]


def test_points_lie_behind_the_middles_of_pixels_and_colours_are_rounded():
    cameras = orbit(2, elevation=20)
    points = surface_points(torch.full((2, 3, 256, 256), 0.999), cameras, count=200)
    halves = torch.from_numpy(points.positions).chunk(2)  # of each view
    for w2c, lens, positions in zip(cameras.w2c, cameras.intrinsics(256), halves, strict=True):
        there = (positions @ w2c[:3, :3].T + w2c[:3, 3]) @ lens.T
        assert max_abs_diff((there[:, :2] / there[:, 2:]) % 1, torch.full((100, 2), 0.5)) < 1e-2
    assert (points.colours == 255).all()
    near_the_border = surface_points(torch.ones(2, 3, 16, 16), orbit(2, radius=2), count=2000)
    assert (near_the_border.colours == 255).all()


def test_quaternions_of_colmap_have_no_negative_scalar(tmp_path):
    cameras = orbit(12, elevation=30)
    folder = write_views(tmp_path / "views", [Image.new("RGB", (32, 32))] * 12, cameras, {}, formats=["colmap"])
    rows = [line.split() for line in (folder / "sparse" / "0" / "images.txt").read_text().splitlines()[1::2]]
    assert len(rows) == 12 and all(float(row[1]) >= 0 for row in rows)


@torch.no_grad()
def test_edges_before_another_background():
    views = render(make_heads([5]), orbit(4).w2c[None], 256)
    for image, alpha in zip(views.rgb[0], views.alpha[0], strict=True):
        picture = torch.from_numpy(np.array(with_alpha(image))).permute(2, 0, 1) / 255
        before_black = picture[:3] * picture[3] - (image - (1 - alpha))
        edge = F.max_pool2d(alpha, 7, 1, 3) > -F.max_pool2d(-alpha, 7, 1, 3)
        assert before_black[:, edge[0]].square().mean() < 1e-3


def test_alpha(tmp_path):
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:48, 16:48] = (200, 40, 40)
    pixels[28:36, 28:36] = 255  # of the background's colour, inside the head
    pixels[16:48, 15] = (228, 148, 148)  # half an edge
    pixels[16:48, 48] = (250, 232, 232)  # a tenth
    pixels[48:, 28:36] = (90, 90, 160)  # a chest
    folder = write_views(tmp_path / "views", [Image.fromarray(pixels)], orbit(1), {}, alpha=True)
    picture = np.asarray(Image.open(folder / "view_000.png")).astype(int)
    assert picture.shape == (64, 64, 4)
    alpha = picture[..., 3]
    assert alpha[:15].max() == 0 and alpha[16:48, 16:48].min() == 255
    blended = picture[..., :3] * alpha[..., None] / 255 + 255 * (1 - alpha[..., None] / 255)
    assert np.abs(blended - pixels).max() <= 1.5
    for column, share, error in ((15, 0.495, 3), (48, 0.107, 10)):  # in 8 bits, before they are divided by the share
        assert np.abs(picture[20, column] - (200, 40, 40, 255 * share)).max() <= error
    assert alpha[56, 30:34].min() == 255
    mask = np.asarray(Image.open(folder / "masks" / "view_000.png"))
    assert np.array_equal(mask, alpha)
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    assert frames[0]["mask_path"] == "masks/view_000.png"
